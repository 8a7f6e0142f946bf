"""What can be bought: all best combinations of choices, cost against noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Beyond this many combinations only the best in each of as many equal intervals of cost are kept.
_MOST_STATES = 4096
# With so few items nothing is left out.
_FEW_ITEMS = 8
_MOST_STATES_OF_FEW = 1 << 18


@dataclass(frozen=True)
class Option:
    """One way to treat one part of a model.

    Attributes:
        cost: what it adds to the cost of the exact step; negative where it saves.
        noise: variance that it adds.
        choice: what it stands for.
    """

    cost: float
    noise: float
    choice: Any = None


@dataclass(frozen=True)
class Point:
    """One combination on the frontier.

    Attributes:
        cost: sum over all items.
        noise: sum over all items.
        choices: of each item, in order.
    """

    cost: float
    noise: float
    choices: tuple[Any, ...]


class Frontier:
    """All combinations that no other one beats in both cost and noise.

    It is built once, item by item, and does not depend on a budget: a larger budget is answered by a point further
    along, never by a noisier one.

    Args:
        items: of each part of the model, its options.

    Law:
        Exact, as an exhaustive search, for up to 8 items (and as long as no more than 4096 combinations are left for
        more of them); beyond, the noise is that of the best combination whose cost is lower by at most
        ``items × range / 4096``.

    Example:
        >>> items = [[Option(0, 0, "a"), Option(-2, 1, "b")], [Option(0, 0, "c"), Option(-2, 3, "d")]]
        >>> for point in Frontier(items).points():
        ...     print(point.cost, point.noise)
        -4.0 4.0
        -2.0 1.0
        0.0 0.0
    """

    def __init__(self, items: Sequence[Sequence[Option]]) -> None:
        self._items = [list(options) for options in items]
        self._trail: list[tuple[np.ndarray, np.ndarray]] = []
        most = _MOST_STATES_OF_FEW if len(items) <= _FEW_ITEMS else _MOST_STATES
        self.costs, self.noises = np.zeros(1), np.zeros(1)
        for options in self._items:
            costs = self.costs[:, None] + np.array([option.cost for option in options])
            noises = self.noises[:, None] + np.array([option.noise for option in options])
            kept = _thin(costs.ravel(), _undominated(costs.ravel(), noises.ravel()), most)
            self._trail.append(np.divmod(kept, len(options)))
            self.costs, self.noises = costs.ravel()[kept], noises.ravel()[kept]

    def points(self) -> list[Point]:
        """Return all points, the cheapest first."""
        return [self.point(position) for position in range(len(self.costs))]

    def point(self, position: int) -> Point:
        """Return the point at a position, the cheapest being at 0."""
        cost, noise = float(self.costs[position]), float(self.noises[position])
        choices = []
        for options, (parents, chosen) in zip(reversed(self._items), reversed(self._trail), strict=True):
            choices.append(options[int(chosen[position])].choice)
            position = int(parents[position])
        return Point(cost, noise, tuple(reversed(choices)))

    def least_noise(self, cost: float) -> Point | None:
        """Return the point of least noise that costs at most `cost`, or None."""
        count = int(np.searchsorted(self.costs, cost, side="right"))
        return self.point(count - 1) if count else None

    def least_cost(self, noise: float) -> Point | None:
        """Return the cheapest point of at most `noise`, or None."""
        within = np.flatnonzero(self.noises <= noise)
        return self.point(int(within[0])) if within.size else None


def _undominated(costs: np.ndarray, noises: np.ndarray) -> np.ndarray:
    """Return the positions of all points that no other beats, by rising cost and falling noise."""
    order = np.lexsort((noises, costs))
    lowest = np.minimum.accumulate(noises[order])
    keep = np.ones(len(order), dtype=bool)
    keep[1:] = noises[order][1:] < lowest[:-1]
    return order[keep]


def _thin(costs: np.ndarray, positions: np.ndarray, most: int) -> np.ndarray:
    """Keep the last point of each interval of cost, and the cheapest of all."""
    if len(positions) <= most:
        return positions
    sorted_costs = costs[positions]
    edges = np.linspace(sorted_costs[0], sorted_costs[-1], most)
    last = np.searchsorted(sorted_costs, edges, side="right") - 1
    return positions[np.unique(np.concatenate([[0], last]))]
