"""Traces, diagonals and norms: by enumeration of all signs, against definitions, and their standard errors."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cheapgrad.curvature import (
    DenseOperator,
    ScalarEstimate,
    VectorEstimate,
    frobenius_norm,
    hutch_plus_plus,
    hutchinson_diagonal,
    hutchinson_trace,
    xdiag,
    xtrace,
)
from cheapgrad.curvature.spectra import exchangeable, probes
from cheapgrad.errors import BudgetError
from tests.oracles.exchangeable import leave_one_out

F64 = torch.float64
# The function of the same name hides the module.
HUTCH_MODULE = importlib.import_module("cheapgrad.curvature.spectra.hutch_plus_plus")


def _decaying(size: int, power: float = 2.0) -> torch.Tensor:
    """A positive matrix with eigenvalues 1, 2^-power, 3^-power, ..."""
    generator = torch.Generator().manual_seed(1)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=F64))
    return basis @ torch.diag(torch.arange(1, size + 1, dtype=F64) ** -power) @ basis.T


def _all_signs(size: int) -> torch.Tensor:
    """Every sign vector, as columns."""
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=size)), dtype=F64).T


def _with_signs(monkeypatch: pytest.MonkeyPatch, module: Any, *draws: torch.Tensor) -> None:
    """Let the module draw these signs, one after the other."""
    queue = list(draws)
    monkeypatch.setattr(module, "draw_signs", lambda operator, columns, generator: queue.pop(0))


SMALL = torch.tensor([[2.0, 1.0, -0.5], [1.0, 3.0, 0.7], [-0.5, 0.7, 1.0]], dtype=F64)


def test_hutchinson_by_enumeration(monkeypatch: pytest.MonkeyPatch) -> None:
    signs = _all_signs(3)
    off_diagonal = SMALL - torch.diag(SMALL.diagonal())
    _with_signs(monkeypatch, probes, signs)
    trace = hutchinson_trace(SMALL, probes=8)
    assert trace.value == pytest.approx(6.0, rel=1e-14)
    # The law's variance, all eight draws being equally likely.
    assert trace.standard_error**2 * 7 == pytest.approx(float(2 * off_diagonal.square().sum()), rel=1e-12)
    assert (trace.products, trace.method) == (8, "hutchinson_trace")
    _with_signs(monkeypatch, probes, signs)
    diagonal = hutchinson_diagonal(SMALL, probes=8)
    torch.testing.assert_close(diagonal.values, SMALL.diagonal())
    torch.testing.assert_close(diagonal.standard_errors.square() * 7, off_diagonal.square().sum(1))
    _with_signs(monkeypatch, probes, signs)
    norm = frobenius_norm(SMALL, probes=8)
    assert norm.value == pytest.approx(float(SMALL.norm()), rel=1e-14)


def _pairs_of_probes() -> list[torch.Tensor]:
    signs = _all_signs(3)
    return [signs[:, [i, j]] for i, j in itertools.product(range(8), repeat=2)]


def test_xtrace_and_xdiag_are_unbiased_by_enumeration(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 64 pairs of probes, equal and opposite ones included."""
    traces, diagonals, spoiled = [], [], []
    for pair in _pairs_of_probes():
        _with_signs(monkeypatch, exchangeable, pair, pair)
        traces.append(xtrace(SMALL, products=4).value)
        diagonals.append(xdiag(SMALL, products=4).values)
        spoiled.append(_without_leaving_out(SMALL, pair))
    assert sum(traces) / 64 == pytest.approx(6.0, rel=1e-10)
    torch.testing.assert_close(sum(diagonals) / 64, SMALL.diagonal(), rtol=1e-10, atol=1e-10)
    # The biased twin, whose probes serve the sketch and the rest at once, is seen.
    assert abs(sum(spoiled) / 64 - 6.0) > 0.3


def _without_leaving_out(matrix: torch.Tensor, signs: torch.Tensor) -> float:
    basis, _ = torch.linalg.qr(matrix @ signs)
    rest = signs - basis @ (basis.T @ signs)
    return float(torch.trace(basis.T @ matrix @ basis) + (rest * (matrix @ rest)).sum(0).mean())


def test_xtrace_and_xdiag_follow_their_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = _decaying(12)
    signs = 1 - 2 * torch.randint(2, (12, 5)).double()
    traces, diagonals = leave_one_out(matrix, signs)
    _with_signs(monkeypatch, exchangeable, signs, signs)
    trace, diagonal = xtrace(matrix, products=11), xdiag(matrix, products=10)
    assert trace.value == pytest.approx(float(traces.mean()), rel=1e-10)
    shorter = [leave_one_out(matrix, torch.cat([signs[:, :index], signs[:, index + 1 :]], 1)) for index in range(5)]
    without = torch.stack([terms.mean() for terms, _ in shorter])
    jackknife = math.sqrt(4 / 5 * float((without - without.mean()).square().sum()))
    assert trace.standard_error == pytest.approx(jackknife, rel=1e-8)
    torch.testing.assert_close(diagonal.values, diagonals.mean(1), rtol=1e-9, atol=1e-12)
    without = torch.stack([terms.mean(1) for _, terms in shorter])
    jackknife = (4 / 5 * (without - without.mean(0)).square().sum(0)).sqrt()
    torch.testing.assert_close(diagonal.standard_errors, jackknife, rtol=1e-8, atol=1e-12)
    assert (trace.products, diagonal.products) == (10, 10)


def test_hutch_plus_plus_is_unbiased_by_enumeration(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 64 sketches, each with all eight probes of the rest."""
    values = []
    for pair in _pairs_of_probes():
        _with_signs(monkeypatch, HUTCH_MODULE, pair, _all_signs(3))
        values.append(hutch_plus_plus(SMALL, products=6).value)
    assert sum(values) / 64 == pytest.approx(6.0, rel=1e-12)


METHODS: dict[str, Callable[..., ScalarEstimate]] = {
    "hutchinson": lambda matrix, generator: hutchinson_trace(matrix, probes=36, generator=generator),
    "hutch++": lambda matrix, generator: hutch_plus_plus(matrix, products=36, generator=generator),
    "xtrace": lambda matrix, generator: xtrace(matrix, products=36, generator=generator),
    "frobenius": lambda matrix, generator: frobenius_norm(matrix, probes=36, generator=generator),
}


@pytest.mark.parametrize("name", METHODS)
def test_standard_errors_are_as_large_as_the_errors(name: str) -> None:
    """200 runs fixed beforehand; the mean squared error against the mean squared standard error."""
    matrix = _decaying(60, 1.0)
    truth = float(matrix.norm()) if name == "frobenius" else float(matrix.trace())
    generator = torch.Generator().manual_seed(5)
    runs = [METHODS[name](matrix, generator) for _ in range(200)]
    errors = torch.tensor([run.value - truth for run in runs])
    claimed = math.sqrt(sum(run.standard_error**2 for run in runs) / 200)
    spread = float(errors.square().mean().sqrt())
    # The jackknife may claim too much, but not too little.
    assert 0.75 < claimed / spread < (2.5 if name == "xtrace" else 1.33), (claimed, spread)
    # No bias, up to the known one of a root.
    bias = spread**2 / (2 * truth) if name == "frobenius" else 0.0
    assert abs(float(errors.mean()) + bias) < 4 * spread / 200**0.5
    assert spread < 0.2 * truth


def test_standard_errors_of_diagonals_are_as_large_as_the_errors() -> None:
    """Root mean squares over entries and 100 runs."""
    matrix, generator = _decaying(60, 1.0), torch.Generator().manual_seed(6)
    for function, low, high in (
        (lambda: hutchinson_diagonal(matrix, probes=36, generator=generator), 0.9, 1.1),
        (lambda: xdiag(matrix, products=36, generator=generator), 0.75, 2.5),
    ):
        runs = [function() for _ in range(100)]
        spread = torch.stack([run.values - matrix.diagonal() for run in runs]).square().mean().sqrt()
        claimed = torch.stack([run.standard_errors for run in runs]).square().mean().sqrt()
        assert low < claimed / spread < high, (claimed, spread)


def test_sketches_pay_where_eigenvalues_decay() -> None:
    matrix, generator = _decaying(80), torch.Generator().manual_seed(0)
    truth = float(matrix.trace())
    errors = {}
    for name in ("hutchinson", "hutch++", "xtrace"):
        runs = [METHODS[name](matrix, generator).value - truth for _ in range(40)]
        errors[name] = math.sqrt(sum(error**2 for error in runs) / 40)
    assert errors["xtrace"] < errors["hutch++"] < errors["hutchinson"] / 5


def test_xdiag_is_exact_where_the_sketch_holds_the_matrix() -> None:
    low_rank = _decaying(20)[:, :3] @ _decaying(20)[:, :3].T
    estimate = xdiag(low_rank, products=12)
    torch.testing.assert_close(estimate.values, low_rank.diagonal(), rtol=1e-8, atol=1e-12)
    assert xtrace(low_rank, products=12).value == pytest.approx(float(low_rank.trace()), rel=1e-9)


def test_many_probes_are_the_mean_of_their_blocks() -> None:
    """More probes than are multiplied at once."""
    matrix = _decaying(10)
    one = hutchinson_diagonal(matrix, probes=50, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    operator = DenseOperator(matrix)
    draws = torch.cat([signs * product for signs, product in probes.multiply_signs(operator, 50, generator)], 1)
    assert draws.shape == (10, 50)
    torch.testing.assert_close(one.values, draws.mean(1))
    torch.testing.assert_close(one.standard_errors, draws.std(1) / 50**0.5)


def test_records_survive_a_round_trip() -> None:
    scalar, vector = hutchinson_trace(SMALL, probes=3), hutchinson_diagonal(SMALL, probes=3)
    assert ScalarEstimate.from_dict(scalar.to_dict()) == scalar
    again = VectorEstimate.from_dict(vector.to_dict())
    assert torch.equal(again.values, vector.values)
    assert torch.equal(again.standard_errors, vector.standard_errors)
    assert (again.products, again.method) == (3, "hutchinson_diagonal")


@pytest.mark.parametrize(
    ("function", "arguments", "match"),
    [
        (hutchinson_trace, {"probes": 1}, "probes must be a whole number of at least 2, but got 1"),
        (hutchinson_diagonal, {"probes": 2.5}, "but got 2.5"),
        (frobenius_norm, {"probes": 0}, "but got 0"),
        (hutch_plus_plus, {"products": 5}, "products must be a whole number of at least 6, but got 5"),
        (hutch_plus_plus, {"products": 12}, "products=12 is more than 3 for each of the 3 dim.* use at most 9"),
        (xtrace, {"products": 8}, "products=8 is more than 2 for each of the 3 dim.* use at most 6"),
        (xdiag, {"products": 3}, "at least 4, but got 3"),
    ],
)
def test_budgets_out_of_range_are_named(function: Callable[..., Any], arguments: dict, match: str) -> None:
    with pytest.raises(BudgetError, match=match):
        function(SMALL, **arguments)
