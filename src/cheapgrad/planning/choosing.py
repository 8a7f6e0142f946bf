"""From what every choice costs and adds, to the choices that keep the budgets with the least noise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cheapgrad.errors import UnreachableBudgetError
from cheapgrad.planning.budget import Limit, describe_limit
from cheapgrad.planning.frontier import Frontier, Option, Point
from cheapgrad.planning.parts import Choice

Cost = Callable[[Choice], float]
# Choices that are made together.
Package = tuple[Choice, ...]

# Of the combinations of the groups inside one block no more than so many are compared with coding it whole.
_MOST_PACKAGES = 64
# With two budgets so many combinations of rows are tried, and these prices of a FLOP in noise, as multiples of one that
# balances all noise there is.
_MOST_ROW_POINTS = 64
# So few combinations of codes are all tried.
_FEW_COMBINATIONS = 4096
_PRICES = (1e3, 1.0, 1e-1, 1e-2, 1e-3, 0.0)


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
        if "memory" not in limits:
            return self._within(limits["flops"], _alone(self.cotangent), self._flops, self._base_flops)
        if "flops" not in limits:
            return self._within(limits["memory"], self._pack(self.stored, self._bytes), self._bytes, self._base_bytes)
        return self._within_both(limits["memory"], limits["flops"])

    def _within_both(self, memory: Limit, flops: Limit) -> tuple[Choice, ...]:
        """Return the best of all combinations of rows with the codes that keep the bytes beside them.

        Rows are tried by rising noise, so that the first ones that leave room for codes are nearly the last ones tried.
        """
        rows = self._frontier(_alone(self.cotangent), self._flops)
        best: Package | None = None
        for point in _thinned(rows, flops.value - self._base_flops):
            if best is not None and point.noise >= _noise(best):
                break
            chosen = _real(point)
            for codes in self._codes_beside(chosen, memory, flops.value - self._base_flops - point.cost):
                if best is None or point.noise + _noise(codes) < _noise(best):
                    best = chosen + codes
        if best is None:
            raise self._why_not_both(memory, flops)
        return best

    def _codes_beside(self, rows: Package, memory: Limit, flops: float) -> Iterator[Package]:
        """Yield codes that keep the bytes beside these rows and add at most so many FLOPs; of few the best alone."""
        room = memory.value - self._base_bytes - math.fsum(choice.bytes_change for choice in rows)
        items = self._pack(self._groups_beside(rows), self._bytes)
        if math.prod(len(item) + 1 for item in items) <= _FEW_COMBINATIONS:
            yield from self._search_all(items, room, flops)
            return
        for price in self._prices(items):
            point = self._frontier(items, self._bytes, price).least_noise(room)
            codes = None if point is None else _real(point)
            if codes is None or math.fsum(choice.flops_change for choice in codes) > flops:
                # The first price is so high that no other codes have fewer FLOPs.
                return
            yield codes

    def _search_all(self, items: Sequence[Sequence[Package]], most_bytes: float, most_flops: float) -> list[Package]:
        """Return the codes of least noise, if any keep both; all combinations are tried."""
        options = [[(), *item] for item in items]
        sums = np.zeros((3, 1))
        for item in options:
            priced = [[math.fsum(map(cost, one)) for one in item] for cost in (self._bytes, self._flops, _noise_of_one)]
            sums = (sums[:, :, None] + np.array(priced)[:, None, :]).reshape(3, -1)
        noises = np.where((sums[0] <= most_bytes) & (sums[1] <= most_flops), sums[2], math.inf)
        best = int(noises.argmin())
        if noises[best] == math.inf:
            return []
        places = np.unravel_index(best, [len(item) for item in options]) if options else ()
        return [tuple(one for item, at in zip(options, places, strict=True) for one in item[int(at)])]

    def _prices(self, items: Sequence[Sequence[Package]]) -> list[float]:
        """Return prices of a FLOP in noise, from one that outweighs all noise down to nothing."""
        packages = [package for item in items for package in item]
        flops = [cost for package in packages if (cost := math.fsum(map(self._flops, package))) > 0]
        if not flops:
            return [0.0]
        noise = math.fsum(max(map(_noise, item), default=0.0) for item in items)
        return [factor * noise / min(flops) for factor in _PRICES]

    def _why_not_both(self, memory: Limit, flops: Limit) -> UnreachableBudgetError:
        """Say which of two budgets is out of reach, or that they are so together."""
        rows = self._frontier(_alone(self.cotangent), self._flops)
        least_bytes = math.inf
        for point in _thinned(rows, math.inf):
            chosen = _real(point)
            codes = self._frontier(self._pack(self._groups_beside(chosen), self._bytes), self._bytes)
            held = self._base_bytes + math.fsum(choice.bytes_change for choice in chosen)
            least_bytes = min(least_bytes, held + float(codes.costs[0]))
        for limit, least in ((flops, self._base_flops + float(rows.costs[0])), (memory, least_bytes)):
            if least > limit.value:
                return _out_of_reach(limit, least)
        return UnreachableBudgetError(
            f"memory={memory.given!r} ({describe_limit(memory)}) and flops={flops.given!r} ({describe_limit(flops)}) "
            "can each be kept, but not both: codes of blocks compute again what they do not hold"
        )

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

    def _frontier(self, items: Sequence[Sequence[Package]], cost: Cost, price: float = 0.0) -> Frontier:
        """Return all best combinations.

        Args:
            items: one package of each is chosen, or none.
            cost: of a choice.
            price: of a FLOP, added to the noise.
        """
        key = (
            tuple((one.layers, one.strategy, cost(one)) for item in items for package in item for one in package),
            cost.__name__,
            price,
        )
        if key not in self._frontiers:
            options = []
            for item in items:
                priced = [(math.fsum(map(cost, package)), package) for package in item]
                useful = [
                    Option(saved, _noise(package) + price * math.fsum(map(self._flops, package)), package)
                    for saved, package in priced
                    if saved < 0
                ]
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
            raise _out_of_reach(limit, base + float(frontier.costs[0]))
        return _real(point)


def _out_of_reach(limit: Limit, least: float) -> UnreachableBudgetError:
    kind = "bytes held" if limit.name == "memory" else "backward FLOPs"
    return UnreachableBudgetError(
        f"{limit.name}={limit.given!r} asks for {describe_limit(limit)}, but the strategies to choose from reach "
        f"{describe_limit(limit, least)} of {kind} at least"
    )


def _thinned(frontier: Frontier, most: float) -> Iterator[Point]:
    """Yield the point of least noise that costs at most so much, then cheaper ones, always the same."""
    count = int(np.searchsorted(frontier.costs, most, side="right"))
    if count:
        fixed = np.unique(np.linspace(0, len(frontier.costs) - 1, _MOST_ROW_POINTS).round().astype(int))
        yield from (frontier.point(int(at)) for at in sorted({count - 1, *fixed[fixed < count]}, reverse=True))


def _real(point: Point) -> Package:
    return tuple(choice for package in point.choices for choice in package)


def _noise(package: Package) -> float:
    return math.fsum(map(_noise_of_one, package))


def _noise_of_one(choice: Choice) -> float:
    return choice.noise.total


def _alone(items: Sequence[Sequence[Choice]]) -> list[list[Package]]:
    return [[(choice,) for choice in item] for item in items]
