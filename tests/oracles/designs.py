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


def replacement_outcomes(size: int, draws: int) -> np.ndarray:
    """Return all sequences of `draws` atoms, shape ``[size ** draws, draws]``."""
    return np.array(list(itertools.product(range(size), repeat=draws)))


def subsets(size: int) -> np.ndarray:
    """Return all subsets as indicators, shape ``[2 ** size, size]``."""
    return np.array(list(itertools.product((0, 1), repeat=size)))
