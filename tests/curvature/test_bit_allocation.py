"""The allocation of bits against exhaustive search and an integer-programming package."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch

from cheapgrad.curvature import bit_allocation
from cheapgrad.curvature.bit_allocation import LayerBits, allocate_bits, quantization_penalty
from cheapgrad.errors import BudgetError, ShapeError
from tests.curvature import published_bits


def draw_layers(count, choices, seed, integers=False):
    """Layers as in the papers: fewer bits cost less and hurt more, by amounts that differ by orders of magnitude."""
    generator = random.Random(seed)
    layers = []
    for index in range(count):
        size = generator.randint(1, 40) if integers else 10 ** generator.uniform(2, 6)
        hurt = 10 ** generator.uniform(-4, 0)
        bits = (2, 4, 8)[-choices:]
        penalties = tuple(hurt * 4.0**-each * generator.uniform(0.5, 2) for each in bits)
        layers.append(LayerBits(f"layer{index}", bits, penalties, tuple(float(size * each) for each in bits)))
    return layers


def search_all(layers, budget):
    best = math.inf
    for chosen in itertools.product(*(range(len(layer.bits)) for layer in layers)):
        if sum(layer.costs[index] for layer, index in zip(layers, chosen, strict=True)) <= budget:
            best = min(best, sum(layer.penalties[index] for layer, index in zip(layers, chosen, strict=True)))
    return best


@pytest.mark.parametrize("integers", [False, True])
def test_equals_exhaustive_search(integers):
    for seed in range(40):
        layers = draw_layers(7, 3, seed, integers)
        lowest, highest = (math.fsum(pick(layer.costs) for layer in layers) for pick in (min, max))
        for share in (0.0, 0.2, 0.5, 0.8, 1.0):
            budget = lowest + share * (highest - lowest)
            found = allocate_bits(layers, budget)
            assert found.penalty == pytest.approx(search_all(layers, budget * (1 + 1e-12)), rel=1e-12)
            assert found.cost <= budget * (1 + 1e-11)
            picked = [layer.bits.index(found.bits[layer.name]) for layer in layers]
            costs = [layer.costs[index] for layer, index in zip(layers, picked, strict=True)]
            assert found.cost == math.fsum(costs)


@pytest.mark.parametrize(("count", "choices"), [(18, 2), (53, 2), (100, 3)])
def test_networks_of_published_size_equal_integer_programming(count, choices):
    optimize = pytest.importorskip("scipy.optimize")
    for seed in range(2):
        layers = draw_layers(count, choices, seed)
        lowest, highest = (math.fsum(pick(layer.costs) for layer in layers) for pick in (min, max))
        budget = (lowest + highest) / 2
        one_each = np.kron(np.eye(count), np.ones(choices))
        costs = np.concatenate([layer.costs for layer in layers])
        penalties = np.concatenate([layer.penalties for layer in layers])
        solved = optimize.milp(
            penalties / penalties.max(),
            constraints=[
                optimize.LinearConstraint(one_each, 1, 1),
                optimize.LinearConstraint(costs / budget, -np.inf, 1),
            ],
            integrality=np.ones(count * choices),
            bounds=optimize.Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        assert allocate_bits(layers, budget).penalty <= solved.fun * penalties.max() * (1 + 1e-6)


def published_layers(what):
    """Return the layers of ResNet18, tied ones as one, and the places of those that each stands for."""
    tied = {index: pair for pair in published_bits.TIED for index in pair}
    groups = [tied.get(index, (index,)) for index in range(len(published_bits.TRACES))]
    groups = list(dict.fromkeys(groups))
    traces, errors, costs = published_bits.TRACES, published_bits.ERRORS, published_bits.COSTS[what]
    layers = [
        LayerBits(
            str(group),
            (4, 8),
            tuple(math.fsum(traces[index] * errors[bits][index] for index in group) for bits in (4, 8)),
            tuple(math.fsum(costs[bits][index] for index in group) for bits in (4, 8)),
        )
        for group in groups
    ]
    return layers, groups


@pytest.mark.parametrize(("what", "share"), published_bits.PUBLISHED)
def test_published_tables_come_out(what, share):
    layers, groups = published_layers(what)
    lowest, highest = (math.fsum(layer.costs[place] for layer in layers) for place in (0, 1))
    found = allocate_bits(layers, lowest + share * (highest - lowest))
    bits = {index: found.bits[layer.name] for layer, group in zip(layers, groups, strict=True) for index in group}
    expected = published_bits.PUBLISHED[what, share].replace(" ", "")
    assert "".join(str(bits[index]) for index in range(len(expected))) == expected


def test_more_budget_never_hurts():
    layers = draw_layers(20, 3, 0)
    highest = math.fsum(layer.costs[-1] for layer in layers)
    penalties = [allocate_bits(layers, highest * share).penalty for share in (0.25, 0.3, 0.5, 0.7, 1.0)]
    assert penalties == sorted(penalties, reverse=True)
    assert set(allocate_bits(layers, math.inf).bits.values()) <= {2, 4, 8}


def test_choices_that_make_no_sense_are_handled():
    """A choice that is dearer and worse, a negative penalty, a layer without cost."""
    layers = [
        LayerBits("odd", (4, 8), (1.0, 2.0), (4.0, 8.0)),
        LayerBits("free", (4, 8), (0.0, -1.0), (0.0, 0.0)),
        LayerBits("only", (8,), (3.0,), (1.0,)),
    ]
    found = allocate_bits(layers, 20.0)
    assert (found.bits, found.penalty, found.cost) == ({"odd": 4, "free": 8, "only": 8}, 3.0, 5.0)


def test_penalty_of_rounding():
    weight = torch.tensor([[0.9, -0.9, 0.31, 0.0], [0.0, 0.0, 0.0, 0.0]])
    # Seven levels up to 0.9 in three bits, 0.3 apart: only 0.31 moves.
    assert quantization_penalty(weight, 3, trace=8.0) == pytest.approx(8 / 8 * 0.01**2, rel=1e-4)
    weight = torch.randn(16, 64)
    fine, coarse = (quantization_penalty(weight, bits, trace=1.0) for bits in (8, 4))
    assert fine * (127 / 7) ** 2 == pytest.approx(coarse, rel=0.15)


def test_bad_input(monkeypatch):
    layers = draw_layers(3, 2, 0, integers=True)
    cheapest = math.fsum(min(layer.costs) for layer in layers)
    with pytest.raises(BudgetError, match=f"cost {cheapest:g} in total, above the budget of {cheapest - 1:g}"):
        allocate_bits(layers, cheapest - 1)
    with pytest.raises(BudgetError, match="budget must be a number, but got nan"):
        allocate_bits(layers, math.nan)
    with pytest.raises(ShapeError, match=r"different names, but got \[\]"):
        allocate_bits([], 1.0)
    with pytest.raises(ShapeError, match="different names, but got"):
        allocate_bits([layers[0], layers[0]], 1e9)
    with pytest.raises(ShapeError, match=r"layer 'x' needs one penalty .* but got 2, 1 and 2"):
        LayerBits("x", (4, 8), (1.0,), (1.0, 2.0))
    with pytest.raises(BudgetError, match=r"cost of layer 'x' at 4 bits must be finite and at least 0, but got -1\.0"):
        LayerBits("x", (4,), (1.0,), (-1.0,))
    with pytest.raises(BudgetError, match="penalty of layer 'x' at 4 bits must be finite, but got nan"):
        LayerBits("x", (4,), (math.nan,), (1.0,))
    with pytest.raises(BudgetError, match="but got bits=17, trace=1"):
        quantization_penalty(torch.ones(2, 2), 17, 1.0)
    monkeypatch.setattr(bit_allocation, "_MOST_STATES", 1)
    with pytest.raises(BudgetError, match="more than 1 partial choices are undominated after"):
        allocate_bits(draw_layers(12, 3, 1), 0.5 * math.fsum(layer.costs[-1] for layer in draw_layers(12, 3, 1)))
