"""Every outcome of a design, by feeding the real code the random numbers that lead to it."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from cheapgrad.sketch import (
    OrderedPivotal,
    Pivotal,
    Poisson,
    Systematic,
    WinnerTakeAll,
    WithReplacement,
    random,
    water_filling,
)
from cheapgrad.sketch.designs import AbstractDesign
from tests.oracles import designs as oracle

# The largest number below one that the door of randomness can give.
ALMOST_ONE = 1 - 2.0**-53


@dataclass(frozen=True)
class Outcomes:
    """All outcomes of one design: their chances ``[M]`` and the weight of every atom in each ``[M, n]`` (0: not drawn).

    `sizes` counts how many atoms were drawn in each, repetitions included.
    """

    chances: np.ndarray
    weights: np.ndarray
    sizes: np.ndarray


def enumerate_design(
    design: AbstractDesign, scores: torch.Tensor, count: int, monkeypatch: pytest.MonkeyPatch
) -> Outcomes:
    """List every outcome of `design`."""
    if isinstance(design, (Systematic, Pivotal, OrderedPivotal)):
        return _enumerate_fixed_size(design, tuple(scores.tolist()), count)
    if isinstance(design, Poisson):
        return _poisson(design, scores, count, monkeypatch)
    assert isinstance(design, (WithReplacement, WinnerTakeAll))
    return _replacement(design, scores, count, monkeypatch)


@functools.cache
def _enumerate_fixed_size(design: AbstractDesign, score_list: tuple[float, ...], count: int) -> Outcomes:
    scores = torch.tensor(score_list, dtype=torch.float64)
    list_outcomes = {Systematic: _systematic, Pivotal: _pivotal, OrderedPivotal: _ordered_pivotal}[type(design)]
    return _fixed_size(scores, count, *list_outcomes(design, scores, count))


def feed(monkeypatch: pytest.MonkeyPatch, numbers: np.ndarray) -> None:
    """Let the door of randomness give `numbers`, whatever shape is asked for."""

    def fed(like, shape, *, double=True, generator=None):
        given = torch.as_tensor(numbers, dtype=torch.float64 if double else torch.float32)
        return given.reshape(tuple(shape))

    monkeypatch.setattr(random, "uniform", fed)


def _keys(orders: np.ndarray) -> torch.Tensor:
    """Return sort keys that put the atoms in the given orders."""
    return torch.as_tensor(np.argsort(orders, axis=-1), dtype=torch.float64)


def _systematic(design, scores, count):
    probabilities = water_filling(scores, count)
    orders = oracle.all_orders(scores.shape[0]) if design.permute else np.arange(scores.shape[0])[None]
    starts, lengths = oracle.systematic_starts(probabilities.numpy(), orders)
    cases = np.nonzero(lengths > 0)
    order = torch.as_tensor(orders)[cases[0]]
    start = torch.as_tensor(starts[cases]).unsqueeze(1)
    index = design.select(probabilities.expand(order.shape), (order, start) if design.permute else (start,), count)
    # A sample of the sets against the definition, atom by atom in plain Python.
    for case in range(0, len(cases[0]), 97):
        expected = oracle.systematic_choice(probabilities.numpy(), orders[cases[0][case]], float(start[case]))
        assert set(index[case].tolist()) == expected
    return index, lengths[cases] / len(orders)


def _pivotal(design, scores, count):
    probabilities = water_filling(scores, count)
    orders = oracle.all_orders(scores.shape[0])
    keys, numbers, chances, sets = [], [], [], []
    for order in orders:
        key = _keys(order)
        for results, chance, taken in oracle.pivotal_outcomes(probabilities.numpy(), order):
            keys.append(key)
            numbers.append([ALMOST_ONE * result for result in results] + [0.0])
            chances.append(chance)
            sets.append(taken)
    keys = torch.stack(keys)
    index = design.select(probabilities.expand_as(keys), (keys, torch.tensor(numbers, dtype=torch.float64)), count)
    assert [set(row) for row in index.tolist()] == sets
    return index, np.array(chances) / len(orders)


def _ordered_pivotal(design, scores, count):
    probabilities = water_filling(scores, count)
    cases = list(itertools.product(*oracle.ordered_pivotal_cells(probabilities.numpy(), count)))
    spots, duels, shares = (np.array([[part[place] for part in case] for case in cases]) for place in range(3))
    numbers = torch.as_tensor(np.concatenate([spots, duels], 1))
    chances = shares.prod(1)
    index = design.select(probabilities.expand(len(cases), -1), (numbers,), count)
    # The duels one after another, atom by atom, make the same sets with the same chances.
    found: dict[frozenset[int], float] = {}
    for chosen, chance in zip(map(frozenset, index.tolist()), chances, strict=True):
        found[chosen] = found.get(chosen, 0.0) + chance
    assert found == pytest.approx(oracle.ordered_pivotal_chances(probabilities.numpy()), rel=1e-9, abs=1e-12)
    return index, chances


def _fixed_size(scores, count, index, chances):
    probabilities = water_filling(scores, count)
    weights = torch.zeros(index.shape[0], scores.shape[0], dtype=torch.float64)
    weights.scatter_(1, index, 1 / probabilities[index])
    return Outcomes(chances, weights.numpy(), (weights > 0).sum(1).numpy())


def _weights_of(selections, size):
    weights = np.zeros((len(selections), size))
    for row, selection in zip(weights, selections, strict=True):
        np.add.at(row, selection.index_K.numpy(), selection.weight_K.numpy())
    return weights, np.array([selection.index_K.shape[0] for selection in selections])


def _poisson(design, scores, count, monkeypatch):
    probabilities = water_filling(scores, count).numpy()
    selections, chances = [], []
    for subset in oracle.subsets(len(probabilities)):
        chance = np.prod(np.where(subset, probabilities, 1 - probabilities))
        if chance > 0:
            feed(monkeypatch, np.where(subset, 0.0, ALMOST_ONE))
            selections.append(design.draw(scores, count))
            chances.append(chance)
            assert selections[-1].index_K.tolist() == np.nonzero(subset)[0].tolist()
    return Outcomes(np.array(chances), *_weights_of(selections, len(probabilities)))


def _replacement(design, scores, count, monkeypatch):
    size = scores.shape[0]
    if isinstance(design, WithReplacement):
        head = np.zeros(size, dtype=bool)
    else:
        head = water_filling(scores, count).numpy() >= 1
    tail = np.where(head, 0.0, scores.numpy())
    shares = tail / tail.sum() if tail.sum() > 0 else ~head / max((~head).sum(), 1)
    middles = shares.cumsum() - shares / 2
    selections, chances = [], []
    for sequence in oracle.replacement_outcomes(size, count):
        # The first slots belong to the head; what they would draw does not matter, so one value stands for all.
        drawn = sequence[head.sum() :]
        if np.any(sequence[: head.sum()] != 0) or np.any(shares[drawn] == 0):
            continue
        feed(monkeypatch, middles[sequence])
        selections.append(design.draw(scores, count))
        chances.append(np.prod(shares[drawn]))
        assert selections[-1].index_K[head.sum() :].tolist() == drawn.tolist()
    return Outcomes(np.array(chances), *_weights_of(selections, size))
