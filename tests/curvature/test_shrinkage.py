"""Shrinkage from one batch, and how to split examples, against closed forms and simulation."""

from __future__ import annotations

import math

import pytest
import torch

from cheapgrad.curvature.shrinkage import shrink_eigenvalues
from cheapgrad.curvature.split_size import choose_split, split_error
from cheapgrad.errors import BudgetError, NonFiniteCurvatureError, ShapeError


def draw_batch(examples, spectrum_P):
    """Return eigenvalues of a batch, and the curvature of all data along its eigenvectors."""
    rows_BP = torch.randn(examples, len(spectrum_P), dtype=torch.float64) * spectrum_P.sqrt()
    values_P, vectors_PP = torch.linalg.eigh(rows_BP.T @ rows_BP / examples)
    return values_P, (vectors_PP.square() * spectrum_P.unsqueeze(1)).sum(0)


@pytest.mark.parametrize(("parameters", "examples", "spike"), [(200, 400, 5.0), (200, 100, 10.0)])
def test_spiked_covariance(parameters, examples, spike):
    aspect = parameters / examples
    overlap = (1 - aspect / (spike - 1) ** 2) / (1 + aspect / (spike - 1))
    spectrum_P = torch.ones(parameters, dtype=torch.float64)
    spectrum_P[0] = spike
    tops, batch_tops = [], []
    for _ in range(40):
        values_P, _ = draw_batch(examples, spectrum_P)
        tops.append(shrink_eigenvalues(values_P, examples)[-1])
        batch_tops.append(values_P[-1])
    true = overlap * spike + 1 - overlap
    shrunk, batch = torch.stack(tops), torch.stack(batch_tops)
    error = shrunk.std() / math.sqrt(40)
    assert abs(shrunk.mean() - true) < 3 * error
    assert abs(batch.mean() - true) > 6 * error


@pytest.mark.parametrize("examples", [400, 100])
def test_general_spectrum(examples):
    spectrum_P = torch.linspace(1, 10, 200, dtype=torch.float64)
    values_P, true_P = draw_batch(examples, spectrum_P)
    shrunk_P = shrink_eigenvalues(values_P, examples)
    assert (shrunk_P - true_P).square().mean() < 0.05 * (values_P - true_P).square().mean()
    # Total curvature is kept nearly, without being asked for.
    assert float(shrunk_P.sum() / true_P.sum()) == pytest.approx(1, abs=0.03)


def test_many_examples_leave_eigenvalues_alone():
    values_P, true_P = draw_batch(200_000, torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    shrunk_P = shrink_eigenvalues(values_P, 200_000)
    torch.testing.assert_close(shrunk_P, values_P, rtol=1e-3, atol=0)
    torch.testing.assert_close(shrunk_P, true_P, rtol=2e-2, atol=0)


def test_order_dtype_and_null_space():
    values_P, _ = draw_batch(20, torch.ones(50, dtype=torch.float64))
    order = torch.randperm(50)
    shuffled = shrink_eigenvalues(values_P[order].float(), 20)
    assert shuffled.dtype == torch.float32
    torch.testing.assert_close(shuffled, shrink_eigenvalues(values_P, 20)[order].float(), rtol=1e-4, atol=1e-4)
    assert len(shrink_eigenvalues(values_P, 20)[:30].unique()) == 1


def test_tiny_batches_stay_finite():
    values_P, _ = draw_batch(5, torch.ones(30, dtype=torch.float64))
    assert torch.isfinite(shrink_eigenvalues(values_P, 5)).all()


def inverse_wishart(dimension, spread):
    """Return a population covariance of mean eigenvalue 1 and (about) the given spread."""
    degrees = round(dimension * (1 + spread) / spread)
    rows = torch.randn(degrees, dimension, dtype=torch.float64)
    return torch.linalg.inv(rows.T @ rows / degrees) * (1 - dimension / degrees)


def simulate(directions, magnitudes, dimension, spread, draws):
    total = 0.0
    for _ in range(draws):
        factor = torch.linalg.cholesky(inverse_wishart(dimension, spread))
        a, b = (torch.randn(size, dimension, dtype=torch.float64) @ factor.T for size in (directions, magnitudes))
        vectors = torch.linalg.eigh(a.T @ a / directions).eigenvectors
        measured = (b @ vectors).square().mean(0)
        estimate = vectors * measured @ vectors.T
        total += float((estimate - factor @ factor.T).square().sum()) / dimension
    return total / draws


def test_modelled_error_is_the_simulated_one():
    for directions, magnitudes in ((60, 60), (150, 30), (215, 25), (100, 140)):
        modelled = float(split_error(torch.tensor(float(directions)), torch.tensor(float(magnitudes)), 60, 0.5))
        assert simulate(directions, magnitudes, 60, 0.5, 30) == pytest.approx(modelled, rel=0.1)


def test_chosen_split_is_the_best_simulated_one():
    chosen = choose_split(240, 60, eigenvalue_spread=0.5)
    assert chosen.directions + chosen.magnitudes == 240
    assert chosen.relative_error * 1.5 == pytest.approx(
        float(split_error(torch.tensor(float(chosen.directions)), torch.tensor(float(chosen.magnitudes)), 60, 0.5))
    )
    best = simulate(chosen.directions, chosen.magnitudes, 60, 0.5, 30)
    for magnitudes in (10, 120, 180):
        assert simulate(240 - magnitudes, magnitudes, 60, 0.5, 30) > best


def test_ratio_goes_with_the_root_of_the_dimension():
    ratios = []
    for dimension in (100, 400, 1600):
        chosen = choose_split(1000 * dimension, dimension)
        ratios.append(chosen.directions / chosen.magnitudes / math.sqrt(dimension / 4))
    assert all(ratio == pytest.approx(1, abs=0.02) for ratio in ratios)


def test_bad_input():
    for options, message in (
        ({"examples": 1, "dimension": 4}, "examples must be a whole number of at least 2, but got 1"),
        ({"examples": 10, "dimension": 0}, "dimension must be a whole number of at least 1, but got 0"),
        ({"examples": 10, "dimension": 4, "eigenvalue_spread": -2.0}, "a positive number, but got -2.0"),
    ):
        with pytest.raises(BudgetError, match=message):
            choose_split(**options)
    with pytest.raises(ShapeError, match=r"but got the shape \(2, 2\)"):
        shrink_eigenvalues(torch.eye(2), 10)
    with pytest.raises(ShapeError, match="a covariance of 3 rows has at most 3 positive eigenvalues, but 5 came"):
        shrink_eigenvalues(torch.ones(5), 3)
    with pytest.raises(NonFiniteCurvatureError, match="got some from -2 to 1; a Hessian needs a second batch"):
        shrink_eigenvalues(torch.tensor([1.0, -2.0]), 10)
    with pytest.raises(BudgetError, match="at least 2, but got 1"):
        shrink_eigenvalues(torch.ones(2), 1)
