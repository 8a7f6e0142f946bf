"""From what every choice costs and adds, to the choices that keep the budgets with the least noise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cheapgrad.errors import UnreachableBudgetError
from cheapgrad.planning.budget import Limit, describe_limit
from cheapgrad.planning.frontier import Frontier, Option, Point
from cheapgrad.planning.parts import Choice

Cost = Callable[[Choice], float]
# Choices that are made together.
Package = tuple[Choice, ...]

# Of the combinations of the groups inside one block no more than so many are compared with coding it whole.
_MOST_PACKAGES = 64
# Rows are chosen again for what codes add to the FLOPs, until that is no more than before.
_MOST_ALTERNATIONS = 8


@dataclass
class Menu:
    """What can be chosen from.

    Attributes:
        cotangent: for each unit, its choices.
        stored: for each group of layers with the same input, its choices.
        regions: for each block whose norms and attention can be coded too, its choices: instead of those of its groups.
        exact_bytes: held by the exact step.
        exact_flops: of the exact backward pass.
        bytes_offset: what the model of bytes has been found to leave out.
        flops_offset: the same for FLOPs.
    """

    cotangent: list[list[Choice]]
    stored: list[list[Choice]]
    exact_bytes: float
    exact_flops: float
    bytes_offset: float = 0.0
    flops_offset: float = 0.0
    regions: list[list[Choice]] = field(default_factory=list)
    _frontiers: dict[object, Frontier] = field(default_factory=dict)

    def within_costs(self, limits: Mapping[str, Limit]) -> tuple[Choice, ...]:
        """Return the choices that keep the bytes and FLOPs of all limits with the least noise.

        Args:
            limits: by the name of the budget, `memory` and `flops`.

        Raises:
            UnreachableBudgetError: if no combination keeps them; says how far one can get.
        """
        cotangent: Package = ()
        stored: Package = ()
        spent = 0.0
        for _ in range(_MOST_ALTERNATIONS):
            try:
                cotangent = self._within_flops(limits, spent)
            except UnreachableBudgetError:
                if not spent:
                    raise
                return dataclasses.replace(self, regions=[]).within_costs(limits)
            stored = self._within_bytes(limits, cotangent)
            again = math.fsum(max(choice.flops_change, 0.0) for choice in stored)
            if "flops" not in limits or again <= spent:
                break
            # Codes of blocks compute something again, which fewer rows have to make up for.
            spent = again
        return cotangent + stored

    def _within_flops(self, limits: Mapping[str, Limit], spent: float) -> tuple[Choice, ...]:
        if "flops" not in limits:
            return ()
        return self._within(limits["flops"], _alone(self.cotangent), self._flops, self._base_flops + spent)

    def _within_bytes(self, limits: Mapping[str, Limit], cotangent: Sequence[Choice]) -> tuple[Choice, ...]:
        if "memory" not in limits:
            return ()
        base = self._base_bytes + sum(choice.bytes_change for choice in cotangent)
        items = self._pack(self._groups_beside(cotangent), self._bytes)
        return self._within(limits["memory"], items, self._bytes, base)

    def within_noise(self, most: float) -> tuple[Choice, ...]:
        """Return the choices with the least sum of the shares of bytes and of FLOPs that add at most this noise.

        Args:
            most: variance, as a plain sum over the choices.
        """
        groups = self._groups_beside([item[0] for item in self.cotangent if item])
        items = [*_alone(self.cotangent), *self._pack(groups, self._shares)]
        point = self._frontier(items, self._shares).least_cost(most)
        return () if point is None else _real(point)

    def least_cost(self, name: str, most: float) -> float:
        """Return the least bytes or FLOPs that can be reached with at most this noise.

        Args:
            name: of the budget, `memory` or `flops`.
            most: variance, as a plain sum over the choices.
        """
        cost, base = (self._bytes, self._base_bytes) if name == "memory" else (self._flops, self._base_flops)
        items = self._pack(self.stored, cost) if name == "memory" else _alone(self.cotangent)
        point = self._frontier(items, cost).least_cost(most)
        return base + (point.cost if point is not None else 0.0)

    def all_choices(self) -> list[Choice]:
        """Return everything that can be chosen."""
        return [choice for item in (*self.cotangent, *self.stored, *self.regions) for choice in item]

    @property
    def _base_bytes(self) -> float:
        return self.exact_bytes + self.bytes_offset

    @property
    def _base_flops(self) -> float:
        return self.exact_flops + self.flops_offset

    @staticmethod
    def _bytes(choice: Choice) -> float:
        return choice.bytes_change

    @staticmethod
    def _flops(choice: Choice) -> float:
        return choice.flops_change

    def _shares(self, choice: Choice) -> float:
        """Return the change of bytes and of FLOPs, each as a share of the exact step's."""
        return choice.bytes_change / (self.exact_bytes or 1) + choice.flops_change / (self.exact_flops or 1)

    def _groups_beside(self, chosen: Sequence[Choice]) -> list[list[Choice]]:
        """Return the groups without what the chosen chains let go anyway."""
        gone = {key for choice in chosen for key in choice.freed}

        def beside(choice: Choice) -> Choice:
            again = sum(size for key, size in choice.freed.items() if key in gone)
            return dataclasses.replace(choice, bytes_change=choice.bytes_change + again)

        return [[beside(choice) for choice in group] for group in self.stored]

    def _frontier(self, items: Sequence[Sequence[Package]], cost: Cost) -> Frontier:
        key = (
            tuple((one.layers, one.strategy, cost(one)) for item in items for package in item for one in package),
            cost.__name__,
        )
        if key not in self._frontiers:
            options = []
            for item in items:
                priced = [(math.fsum(map(cost, package)), package) for package in item]
                useful = [Option(price, _noise(package), package) for price, package in priced if price < 0]
                options.append([Option(0.0, 0.0, ()), *useful])
            self._frontiers[key] = Frontier(options)
        return self._frontiers[key]

    def _pack(self, groups: Sequence[Sequence[Choice]], cost: Cost) -> list[list[Package]]:
        """Return items of which one package each is chosen: a block takes one code, or its groups have their own."""
        items, inner = [], set()
        for region in self.regions:
            members = set(region[0].layers)
            inside = [group for group in groups if group and members & set(group[0].layers)]
            inner.update(map(id, inside))
            points = self._frontier(_alone(inside), cost).points() if inside else []
            thinned = points[:: -(-len(points) // _MOST_PACKAGES) or 1]
            items.append([*map(_real, thinned), *((choice,) for choice in region)])
        return items + _alone([group for group in groups if id(group) not in inner])

    def _within(self, limit: Limit, items: Sequence[Sequence[Package]], cost: Cost, base: float) -> tuple[Choice, ...]:
        frontier = self._frontier(items, cost)
        point = frontier.least_noise(limit.value - base)
        if point is None:
            least = base + float(frontier.costs[0])
            kind = "bytes held" if limit.name == "memory" else "backward FLOPs"
            raise UnreachableBudgetError(
                f"{limit.name}={limit.given!r} asks for {describe_limit(limit)}, but the strategies to choose from "
                f"reach {describe_limit(limit, least)} of {kind} at least"
            )
        return _real(point)


def _real(point: Point) -> Package:
    return tuple(choice for package in point.choices for choice in package)


def _noise(package: Package) -> float:
    return math.fsum(choice.noise.total for choice in package)


def _alone(items: Sequence[Sequence[Choice]]) -> list[list[Package]]:
    return [[(choice,) for choice in item] for item in items]
