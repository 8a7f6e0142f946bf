"""Debiased Newton steps against dense solves, and the correction of inverses against enumeration."""

from __future__ import annotations

import math

import pytest
import torch

from cheapgrad.curvature import DenseOperator, MeanOperator
from cheapgrad.curvature.debiased_conjugate_gradient import BatchQuadratic
from cheapgrad.curvature.inverse_correction import correct_inverse
from cheapgrad.curvature.newton import debiased_newton_step
from cheapgrad.errors import BatchError, BudgetError, SingularCurvatureError


def make_quadratic(examples=60, parameters=8, parts=1):
    rows_BP = torch.randn(examples, parameters, dtype=torch.float64)
    operators = [DenseOperator(rows.T @ rows / len(rows), example_count=len(rows)) for rows in rows_BP.chunk(parts)]
    return BatchQuadratic(MeanOperator(operators), torch.randn(parameters, dtype=torch.float64))


@pytest.mark.parametrize("whole_subspace", [False, True])
def test_all_directions_of_identical_batches_give_the_dense_step(whole_subspace):
    a = make_quadratic()
    b = BatchQuadratic(DenseOperator(a.operator.to_dense(), example_count=60), a.gradient)
    step = debiased_newton_step(a, b, 8, damping=0.1, whole_subspace=whole_subspace)
    damped = a.operator.to_dense() + 0.1 * torch.eye(8, dtype=torch.float64)
    expected = -torch.linalg.solve(damped, a.gradient)
    for name in ("same_batch", "debiased", "double_size"):
        torch.testing.assert_close(getattr(step, name), expected, rtol=1e-10, atol=1e-10)


def test_whole_subspace_of_all_directions_is_the_second_batchs_own_step():
    a, b = make_quadratic(), make_quadratic()
    step = debiased_newton_step(a, b, 8, damping=0.1, whole_subspace=True)
    damped = b.operator.to_dense() + 0.1 * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(step.debiased, -torch.linalg.solve(damped, b.gradient), rtol=1e-10, atol=1e-10)


def test_magnitudes_of_the_second_batch_along_directions_of_the_first():
    a, b = make_quadratic(), make_quadratic()
    step = debiased_newton_step(a, b, 3, damping=0.1)
    directions_PK = step.sample.directions_PK
    curvatures = (directions_PK * (b.operator @ directions_PK)).sum(0) + 0.1
    expected = -directions_PK @ ((b.gradient @ directions_PK) / curvatures)
    torch.testing.assert_close(step.debiased, expected, rtol=1e-10, atol=1e-10)
    both = (a.operator.to_dense() + b.operator.to_dense()) / 2
    values, vectors = torch.linalg.eigh(both)
    gradient = (a.gradient + b.gradient) / 2
    double = -vectors[:, -3:] @ ((gradient @ vectors[:, -3:]) / (values[-3:] + 0.1))
    torch.testing.assert_close(step.double_size, double, rtol=1e-10, atol=1e-10)


def test_micro_batches_bring_the_correction_of_the_inverse():
    a, b = make_quadratic(), make_quadratic(parts=6)
    step = debiased_newton_step(a, b, 3, damping=0.1)
    sample = step.sample
    assert sample.slope is not None
    lengths = -sample.slope.held_out * sample.inverse(0.1)
    torch.testing.assert_close(step.debiased, sample.directions_PK @ lengths)
    assert (sample.inverse(0.1) < 1 / (sample.held_out + 0.1)).all()


@pytest.mark.parametrize("whole_subspace", [False, True])
def test_full_batch_is_plain(whole_subspace):
    full, other = make_quadratic(), make_quadratic(20, parts=2)
    options = {"damping": 0.1, "whole_subspace": whole_subspace, "population_size": 60}
    step = debiased_newton_step(full, other, 3, **options)
    torch.testing.assert_close(step.debiased, step.same_batch, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spread", [0.1, 0.05])
def test_inverse_is_unbiased_to_first_order(spread):
    """An estimate that is 2 ± spread with equal probability: both outcomes are listed."""
    outcomes = torch.tensor([2 - spread, 2 + spread], dtype=torch.float64)
    variance = torch.full_like(outcomes, spread**2)
    plain_bias = float((1 / outcomes).mean() - 0.5)
    bias = float(correct_inverse(outcomes, variance).mean() - 0.5)
    assert plain_bias == pytest.approx(spread**2 / 8, rel=0.01)
    assert abs(bias) < 6 * spread**4 / 32
    assert abs(bias) < 0.02 * plain_bias


def test_inverse_is_bounded_and_agrees_with_the_series():
    estimate = torch.tensor([0.0, 1e-6, 3.0], dtype=torch.float64)
    variance = torch.tensor([0.01, 0.01, 0.01], dtype=torch.float64)
    inverse = correct_inverse(estimate, variance)
    assert inverse[:2].abs().max() < 5
    assert float(inverse[2]) == pytest.approx(1 / 3 - 0.01 / 27, abs=1e-5)


def test_bad_input():
    with pytest.raises(BatchError, match=r"1 of 2 variances are -1\.0"):
        correct_inverse(torch.ones(2), torch.tensor([1.0, -1.0]))
    with pytest.raises(BatchError, match="1 of 1 variances are not known"):
        correct_inverse(torch.ones(1), torch.tensor([math.nan]))
    a, b = make_quadratic(), make_quadratic()
    flat = BatchQuadratic(torch.zeros(8, 8, dtype=torch.float64), a.gradient)
    with pytest.raises(BudgetError, match=r"damping must be a number of at least 0, but got -0\.1"):
        debiased_newton_step(a, b, 2, damping=-0.1)
    for whole_subspace in (False, True):
        with pytest.raises(SingularCurvatureError, match=r"batch b is 0 along direction 0 of 2 \(damping=0\.0\)"):
            debiased_newton_step(a, flat, 2, damping=0.0, whole_subspace=whole_subspace)
    indefinite = torch.diag(torch.tensor([1.0, -2.0]))
    with pytest.raises(SingularCurvatureError, match=r"batch a is -1\.5 along direction 1 of 2 \(damping=0\.5\)"):
        debiased_newton_step(
            BatchQuadratic(indefinite, torch.ones(2)), BatchQuadratic(torch.eye(2), torch.ones(2)), 2, damping=0.5
        )
