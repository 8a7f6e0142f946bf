"""Low rank: the optimum is reached, the rank is bounded in every draw, and an old basis does no harm."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from cheapgrad.errors import BudgetError, PlacementError
from cheapgrad.sketch import DenseMatrix, LowRank, Moment, Operands, Pivotal, Systematic, minimum_variance
from cheapgrad.sketch.range_basis import RangeBasis, find_range

SPECTRA = {
    "one large": [10.0, 1.0, 0.9, 0.8, 0.5, 0.3],
    "decaying": [3.0, 2.0, 1.2, 0.7, 0.4, 0.2],
    "flat": [1.0] * 6,
}


def _matrix(spectrum, rows=9):
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(rows, 6, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    return (left * torch.tensor(spectrum, dtype=torch.float64)) @ right


def _stand_in(strategy, matrix, memory=None):
    return strategy.draw(Operands(Moment.COTANGENT, None, matrix), memory).dense()


@pytest.mark.parametrize("design", [Systematic(), Pivotal()], ids=repr)
@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_optimum_is_reached_and_the_rank_bounded(name, rank, design):
    matrix, strategy = _matrix(SPECTRA[name]), LowRank(rank=rank, design=design)
    draws = torch.func.vmap(lambda _: _stand_in(strategy, matrix), randomness="different")(torch.zeros(8000))
    squared_errors = (draws - matrix).square().sum((1, 2))
    # The certain components, as few as possible, with the formula written out.
    spectrum, certain = np.array(SPECTRA[name]), 0
    while (rank - certain) * spectrum[certain] > spectrum[certain:].sum():
        certain += 1
    tail = spectrum[certain:]
    optimum = tail.sum() ** 2 / (rank - certain) - (tail**2).sum()
    assert float(squared_errors.mean()) == pytest.approx(optimum, rel=0.03)
    assert float(minimum_variance(torch.tensor(spectrum), rank)) == pytest.approx(optimum, rel=1e-12)
    # With X = I the law's variance of dW is that of the matrix itself.
    stated = strategy.law.variance(torch.eye(9, dtype=torch.float64), matrix, moment=Moment.COTANGENT)
    assert float(stated.weight) == pytest.approx(optimum, rel=1e-9)
    assert int(torch.linalg.matrix_rank(draws[:500], rtol=1e-9).max()) <= rank


@pytest.mark.parametrize("refresh", [1, 3])
def test_the_lazy_form_keeps_its_rank(refresh):
    matrix, strategy = _matrix(SPECTRA["decaying"]), LowRank(rank=4, refresh=refresh)
    memory = strategy.new_memory()
    ranks = [int(torch.linalg.matrix_rank(_stand_in(strategy, matrix, memory), rtol=1e-9)) for _ in range(50)]
    assert max(ranks) <= 4


def test_a_matrix_of_rank_within_the_budget_is_exact():
    matrix = _matrix([4.0, 2.0, 1.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(_stand_in(LowRank(rank=3), matrix), matrix, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(_stand_in(LowRank(rank=6), matrix), matrix, rtol=1e-10, atol=1e-10)
    stated = LowRank(rank=6).law.variance(_matrix(SPECTRA["flat"]), matrix, moment=Moment.COTANGENT)
    assert float(stated.weight) == pytest.approx(0, abs=1e-12)


def test_the_basis_is_renewed_when_it_is_due_and_not_before():
    memory, matrix = RangeBasis(refresh=3), _matrix(SPECTRA["decaying"])
    bases = [memory.basis_for(matrix + 0.5 * torch.randn_like(matrix), 2) for _ in range(7)]
    same = [torch.equal(first, second) for first, second in itertools.pairwise(bases)]
    assert same == [True, True, False, True, True, False]


def test_the_basis_is_renewed_when_the_matrix_changes_its_width():
    memory = RangeBasis(refresh=100)
    assert memory.basis_for(torch.randn(9, 6), 2).shape == (6, 2)
    assert memory.basis_for(torch.randn(9, 5), 2).shape == (5, 2)
    assert memory.basis_for(torch.randn(9, 5), 3).shape == (5, 3)


def test_the_range_finder_is_orthonormal_and_finds_a_range_of_that_rank():
    matrix = _matrix([4.0, 2.0, 0.0, 0.0, 0.0, 0.0])
    basis = find_range(matrix, 2)
    torch.testing.assert_close(basis.T @ basis, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix @ basis @ basis.T, matrix, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [0, -1, 2.5, True])
def test_rank_out_of_range(rank):
    with pytest.raises(BudgetError, match=f"rank must be a whole number of at least 1, but got {rank!r}"):
        LowRank(rank=rank)


def test_refresh_out_of_range():
    with pytest.raises(BudgetError, match="refresh must be a whole number of at least 1, but got 0"):
        LowRank(rank=4, refresh=0)
    with pytest.raises(BudgetError, match=r"rank must be at least 2 with refresh .* but got 1"):
        LowRank(rank=1, refresh=5)


@pytest.mark.parametrize(("moment", "text"), [(Moment.STORED, "8 input"), (Moment.COTANGENT, "6 output")])
def test_rank_larger_than_the_layer(moment, text):
    with pytest.raises(BudgetError, match=rf"rank=9 is larger than the layer's {text} features; use a rank in \[1, "):
        LowRank(rank=9).check_layer(8, 6, moment)
    LowRank(rank=6).check_layer(8, 6, moment)


def test_a_design_that_is_none():
    with pytest.raises(PlacementError, match=r"design must be a sampling design such as Systematic.*got 'pivotal'"):
        LowRank(rank=3, design="pivotal")


def test_more_rank_than_rows_is_exact():
    matrix = _matrix(SPECTRA["flat"])[:2]
    strategy = LowRank(rank=4)
    kept = strategy.store(Operands(Moment.STORED, DenseMatrix(matrix)))
    torch.testing.assert_close(strategy.restore(kept, 2, 6, torch.float64).dense(), matrix, rtol=1e-10, atol=1e-12)
