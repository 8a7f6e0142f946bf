"""Fixed-size designs at sizes beyond enumeration: sizes and indices in every draw, frequencies in a binomial band."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from cheapgrad.sketch import OrderedPivotal, Pivotal, Systematic, water_filling

DRAWS = 20_000
SIZE, COUNT = 50, 12
FAMILY = 1e-6


def _scores(kind):
    generator = torch.Generator().manual_seed(3)
    uniform = torch.rand(SIZE, generator=generator, dtype=torch.float64)
    return {"flat": torch.ones(SIZE, dtype=torch.float64), "mild": 0.2 + uniform, "skewed": 0.01 + uniform**4}[kind]


def _outside_band(index, probabilities, tests):
    """Return the atoms whose frequency over the draws chance does not explain."""
    counts = np.bincount(np.asarray(index).ravel(), minlength=SIZE)
    chance = np.asarray(probabilities)
    low, high = stats.binom.cdf(counts, DRAWS, chance), stats.binom.sf(counts - 1, DRAWS, chance)
    return np.nonzero(np.minimum(low, high) < FAMILY / (2 * tests))[0]


@pytest.mark.parametrize("kind", ["flat", "mild", "skewed"])
@pytest.mark.parametrize("design", [Systematic(), Pivotal(), OrderedPivotal()], ids=repr)
def test_sizes_and_frequencies(design, kind):
    scores = _scores(kind)
    selection = design.draw(scores.expand(DRAWS, SIZE), COUNT)
    assert selection.index_K.shape == (DRAWS, COUNT)
    assert (selection.index_K.sort(-1).values.diff(dim=-1) > 0).all(), "an atom was drawn twice"
    probabilities = water_filling(scores, COUNT)
    assert _outside_band(selection.index_K, probabilities, tests=6 * SIZE).size == 0
    torch.testing.assert_close(selection.weight_K, 1 / probabilities[selection.index_K], rtol=1e-12, atol=0)


def test_torch_multinomial_does_not_have_the_marginals_asked_for():
    probabilities = water_filling(_scores("skewed"), COUNT)
    index = torch.multinomial(probabilities.expand(DRAWS, SIZE), COUNT, replacement=False)
    assert _outside_band(index, probabilities, tests=6 * SIZE).size > SIZE // 4


@pytest.mark.parametrize("design", [Systematic(), Pivotal(), OrderedPivotal()], ids=repr)
def test_repeated_draws_differ(design):
    scores = _scores("mild")
    draws = {tuple(design.draw(scores, COUNT).index_K.sort().values.tolist()) for _ in range(50)}
    assert len(draws) >= 49


@pytest.mark.parametrize("design", [Systematic(), Pivotal(), OrderedPivotal()], ids=repr)
def test_a_generator_is_honoured(design):
    scores = _scores("mild")
    first = design.draw(scores, COUNT, generator=torch.Generator().manual_seed(5))
    state = torch.random.get_rng_state()
    second = design.draw(scores, COUNT, generator=torch.Generator().manual_seed(5))
    assert torch.equal(first.index_K, second.index_K)
    assert torch.equal(torch.random.get_rng_state(), state)
