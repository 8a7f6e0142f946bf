"""Sampling designs by their definitions: every order, every random outcome, each with its probability."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np


def all_orders(size: int) -> np.ndarray:
    """Return all permutations, shape ``[size!, size]``."""
    return np.array(list(itertools.permutations(range(size))))


def systematic_starts(probabilities: np.ndarray, orders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, per order, starting points that stand for all, and the length of the interval each stands for.

    Between two neighbouring fractional parts of the cumulative sums the chosen set does not change, so the midpoint of
    each interval stands for it. Intervals shorter than rounding have length zero.
    """
    sums = probabilities[orders].cumsum(1)
    fractions = sums - np.floor(sums)
    edges = np.sort(np.concatenate([np.zeros((len(orders), 1)), fractions, np.ones((len(orders), 1))], axis=1), axis=1)
    lengths = np.diff(edges, axis=1)
    lengths[lengths < 1e-13] = 0.0
    return (edges[:, 1:] + edges[:, :-1]) / 2, lengths


def systematic_choice(probabilities: np.ndarray, order: np.ndarray, start: float) -> set[int]:
    """Return the atoms whose stretch of the line holds one of the points ``start, start + 1, ...``."""
    chosen, position = set(), 0.0
    for atom in order:
        end = position + probabilities[atom]
        if np.floor(end - start) > np.floor(position - start):
            chosen.add(int(atom))
        position = end
    return chosen


def pivotal_outcomes(probabilities: np.ndarray, order: np.ndarray) -> Iterator[tuple[list[int], float, set[int]]]:
    """Yield, for one order, every string of duel results (1: the second atom survives), its chance and the set taken.

    Neighbours duel round by round; a missing neighbour is an atom of probability zero. Impossible results are left out.
    """
    size = 1
    while size < len(order):
        size *= 2
    players = [(float(probabilities[atom]), int(atom)) for atom in order] + [(0.0, -1)] * (size - len(order))
    yield from _play([], players, [], 1.0, set())


def _play(waiting, survivors, results, chance, taken):
    """Play on from the state of a round: who still waits for a duel, and who has survived one."""
    if not waiting:
        if len(survivors) > 1:
            yield from _play(survivors, [], results, chance, taken)
        else:
            last = {survivors[0][1]} if survivors[0][0] > 0.5 else set()
            yield results, chance, taken | last
        return
    (mass_a, a), (mass_b, b), *rest = waiting
    mass = mass_a + mass_b
    if mass <= 1:
        second_survives, left = (mass_b / mass if mass > 0 else 0.0), mass
    else:
        second_survives, left = ((1 - mass_b) / (2 - mass) if mass < 2 else 0.0), mass - 1
    for result, share, survivor, settled in ((0, 1 - second_survives, a, b), (1, second_survives, b, a)):
        if share > 1e-15:
            now_taken = taken | {settled} if mass > 1 else taken
            yield from _play(rest, [*survivors, (left, survivor)], [*results, result], chance * share, now_taken)


def ordered_pivotal_chances(probabilities: np.ndarray) -> dict[frozenset[int], float]:
    """Return the chance of every set, by duels one after another: whoever is not settled meets the next atom."""
    states = {(0, float(probabilities[0]), frozenset()): 1.0}
    for atom, mass_b in enumerate(probabilities[1:].tolist(), start=1):
        grown: dict[tuple[int, float, frozenset[int]], float] = {}
        for (standing, mass_a, taken), chance in states.items():
            for winner, loser, left, is_taken, share in _duel(standing, mass_a, atom, mass_b):
                state = (winner, left, taken | {loser} if is_taken else taken)
                if share > 1e-15:
                    grown[state] = grown.get(state, 0.0) + chance * share
        states = grown
    chances: dict[frozenset[int], float] = {}
    for (standing, mass, taken), chance in states.items():
        chosen = taken | {standing} if mass > 0.5 else taken
        chances[chosen] = chances.get(chosen, 0.0) + chance
    return chances


def _duel(a: int, mass_a: float, b: int, mass_b: float) -> Iterator[tuple[int, int, float, bool, float]]:
    """Yield winner, loser, the winner's mass, whether the loser is taken, and the chance."""
    mass = mass_a + mass_b
    # Sums of probabilities that make a whole number do so up to rounding only.
    is_taken = mass > 1 - 1e-12
    if is_taken:
        a_wins = (1 - mass_a) / (2 - mass) if mass < 2 - 1e-12 else 0.0
    else:
        a_wins = mass_a / mass if mass > 0 else 1.0
    left = max(mass - 1, 0.0) if is_taken else mass
    yield a, b, left, is_taken, a_wins
    yield b, a, left, is_taken, 1 - a_wins


def ordered_pivotal_cells(probabilities: np.ndarray, count: int) -> list[list[tuple[float, float, float]]]:
    """Return, per cell, all cases as (number of the contest, number of the duel, chance)."""
    ends = probabilities.cumsum()
    ends = np.concatenate([[0.0], ends * (count / ends[-1])])
    cells, border = [], -1
    for cell in range(count):
        # Where a sum that should be a whole number is just below it, the next atom is the border instead.
        border = max(border + 1, int(np.nonzero(ends[1:] >= cell + 1)[0][0]))
        border = min(border, len(probabilities) - count + cell)
        settled = min(max(ends[border] - cell, 0.0), 1.0)
        rest = min(max(ends[border + 1] - cell - 1, 0.0), 1.0)
        edges = np.array([0.0, *(end - cell for end in ends[1 : border + 1] if end > cell)])
        contests = [((low + high) / 2 / settled, (high - low) / settled) for low, high in itertools.pairwise(edges)]
        taken = (1 - settled) / (1 - rest) if rest < 1 else 0.0
        cells.append(
            [
                (spot, duel, share * chance)
                for spot, share in contests or [(0.5, 1.0)]
                for duel, chance in ((0.0, taken), (1 - 2.0**-53, 1 - taken))
                if share * chance > 1e-13
            ]
        )
    return cells


def replacement_outcomes(size: int, draws: int) -> np.ndarray:
    """Return all sequences of `draws` atoms, shape ``[size ** draws, draws]``."""
    return np.array(list(itertools.product(range(size), repeat=draws)))


def subsets(size: int) -> np.ndarray:
    """Return all subsets as indicators, shape ``[2 ** size, size]``."""
    return np.array(list(itertools.product((0, 1), repeat=size)))
