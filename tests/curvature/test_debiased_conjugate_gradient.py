"""Debiased conjugate gradients against plain ones, dense solves and the baseline of the same budget."""

from __future__ import annotations

import math

import pytest
import torch

from cheapgrad.curvature import DenseOperator, MeanOperator
from cheapgrad.curvature.conjugate_gradient import (
    ConjugateGradientSettings,
    Magnitudes,
    StopReason,
    run_conjugate_gradient,
)
from cheapgrad.curvature.debiased_conjugate_gradient import (
    BatchQuadratic,
    debiased_conjugate_gradient,
    merge_quadratics,
)
from cheapgrad.errors import (
    BatchError,
    BudgetError,
    NonFiniteCurvatureError,
    OverlapError,
    ShapeError,
    SingularCurvatureError,
)
from tests.oracles.conjugate_gradient import minimise

ALL = list(Magnitudes)


def regression(examples, parameters, noise=1.0, decay=0.0):
    """Return inputs ``[B, P]`` and the gradients of all examples' squared errors ``[B, P]`` at zero."""
    inputs_BP = torch.randn(examples, parameters, dtype=torch.float64)
    inputs_BP *= torch.arange(1, parameters + 1).double() ** -decay
    targets_B = inputs_BP.sum(1) / math.sqrt(parameters) + noise * torch.randn(examples, dtype=torch.float64)
    return inputs_BP, -inputs_BP * targets_B.unsqueeze(1)


def quadratic(inputs_BP, gradients_BP, with_count=True):
    count = len(inputs_BP) if with_count else None
    curvature_PP = inputs_BP.T @ inputs_BP / len(inputs_BP)
    return BatchQuadratic(DenseOperator(curvature_PP, example_count=count), gradients_BP.mean(0))


def two_batches(examples=60, parameters=20, **options):
    data = [regression(examples, parameters, **options) for _ in range(2)]
    return [quadratic(*each) for each in data]


SETTINGS = ConjugateGradientSettings(iterations=12, damping=1e-2, tolerance=0.0)


class TestPlain:
    def test_equals_the_dense_solution(self):
        a, _ = two_batches()
        run = run_conjugate_gradient(a.operator, a.gradient, ConjugateGradientSettings(40, 0.1, 1e-12))
        damped = a.operator.to_dense() + 0.1 * torch.eye(20, dtype=torch.float64)
        torch.testing.assert_close(run.solution(), -torch.linalg.solve(damped, a.gradient), rtol=1e-10, atol=1e-10)
        assert run.stopped is StopReason.CONVERGED

    def test_every_iterate_is_the_minimum_over_its_krylov_space(self):
        a, _ = two_batches()
        run = run_conjugate_gradient(a.operator, a.gradient, SETTINGS)
        for steps in range(7):
            expected = minimise(a.operator.to_dense().numpy(), a.gradient.numpy(), SETTINGS.damping, steps)
            torch.testing.assert_close(run.solution(steps), torch.from_numpy(expected), rtol=1e-8, atol=1e-10)

    def test_residuals_are_those_of_the_iterates(self):
        a, _ = two_batches()
        run = run_conjugate_gradient(a.operator, a.gradient, SETTINGS)
        for steps in (0, 3, 12):
            point = run.solution(steps)
            residual = a.operator @ point + SETTINGS.damping * point + a.gradient
            assert float(residual.norm()) == pytest.approx(float(run.residual_norms[steps]), rel=1e-8)
        assert run.stopped is StopReason.ITERATIONS

    def test_singular_but_consistent_needs_no_damping(self):
        run = run_conjugate_gradient(torch.diag(torch.tensor([1.0, 2.0, 0.0])), torch.tensor([1.0, 1.0, 0.0]))
        torch.testing.assert_close(run.solution(), torch.tensor([-1.0, -0.5, 0.0]))

    def test_negative_curvature_later_ends_the_run_and_says_so(self):
        run = run_conjugate_gradient(torch.diag(torch.tensor([5.0, -1.0])), torch.tensor([1.0, 1.0]))
        assert run.stopped is StopReason.CURVATURE
        assert len(run.slopes) == 1

    def test_zero_gradient_is_converged_at_once(self):
        run = run_conjugate_gradient(torch.eye(3), torch.zeros(3))
        assert run.stopped is StopReason.CONVERGED
        assert run.solution().tolist() == [0.0, 0.0, 0.0]

    def test_float32_stops_at_its_rounding(self):
        a, _ = two_batches()
        settings = ConjugateGradientSettings(iterations=500, tolerance=0.0)
        run = run_conjugate_gradient(a.operator.to_dense().float(), a.gradient.float(), settings)
        assert run.stopped is StopReason.CONVERGED
        assert len(run.slopes) < 60


@pytest.mark.parametrize("magnitudes", ALL)
def test_same_batch_twice_is_plain(magnitudes):
    a, _ = two_batches()
    run = debiased_conjugate_gradient(a, a, SETTINGS, magnitudes=magnitudes)
    plain = run_conjugate_gradient(a.operator, a.gradient, SETTINGS)
    for steps in (1, 5, 12):
        torch.testing.assert_close(run.solution(steps), plain.solution(steps), rtol=1e-10, atol=1e-10)
    # Batches of identical content, but not the identical object, do so as well.
    copy = BatchQuadratic(DenseOperator(a.operator.to_dense(), example_count=60), a.gradient.clone())
    again = debiased_conjugate_gradient(a, copy, SETTINGS, magnitudes=magnitudes)
    torch.testing.assert_close(again.solution(), plain.solution(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(again.double_size.solution(), plain.solution(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("magnitudes", ALL)
def test_full_batch_is_plain(magnitudes):
    full, other = two_batches()
    run = debiased_conjugate_gradient(full, other, SETTINGS, magnitudes=magnitudes, population_size=60)
    plain = run_conjugate_gradient(full.operator, full.gradient, SETTINGS)
    torch.testing.assert_close(run.solution(), plain.solution(), rtol=1e-10, atol=1e-10)


def test_line_search_is_the_stated_recursion():
    a, b = two_batches()
    run = debiased_conjugate_gradient(a, b, SETTINGS)
    damped = b.operator.to_dense() + SETTINGS.damping * torch.eye(20, dtype=torch.float64)
    point = torch.zeros(20, dtype=torch.float64)
    for step, direction in enumerate(run.same_batch.directions_PK.T):
        point -= direction * (direction @ (b.gradient + damped @ point)) / (direction @ damped @ direction)
        torch.testing.assert_close(run.solution(step + 1), point, rtol=1e-10, atol=1e-10)


def test_subspace_is_the_minimum_over_the_span():
    a, b = two_batches()
    run = debiased_conjugate_gradient(a, b, SETTINGS, magnitudes=Magnitudes.SUBSPACE)
    point = run.solution()
    gradient = b.operator @ point + SETTINGS.damping * point + b.gradient
    assert (run.same_batch.directions_PK.T @ gradient).abs().max() < 1e-9


def test_diagonal_takes_every_direction_by_itself():
    a, b = two_batches()
    run = debiased_conjugate_gradient(a, b, SETTINGS, magnitudes=Magnitudes.DIAGONAL)
    torch.testing.assert_close(run.coefficients(), -run.held_out_slopes / run.held_out_curvatures)


def test_baseline_is_one_batch_of_double_size():
    data = [regression(size, 20) for size in (40, 80)]
    a, b = (quadratic(*each) for each in data)
    both = quadratic(*(torch.cat(parts) for parts in zip(*data, strict=True)))
    run = debiased_conjugate_gradient(a, b, SETTINGS)
    plain = run_conjugate_gradient(both.operator, both.gradient, SETTINGS)
    torch.testing.assert_close(run.double_size.solution(), plain.solution(), rtol=1e-10, atol=1e-10)
    assert run.products == (24, 24)


def test_finite_population_uses_the_corrected_quadratic():
    inputs, gradients = regression(90, 10)
    a, b = quadratic(inputs[:30], gradients[:30]), quadratic(inputs[30:], gradients[30:])
    full = quadratic(inputs, gradients)
    run = debiased_conjugate_gradient(a, b, SETTINGS, population_size=90)
    oracle = debiased_conjugate_gradient(a, full, SETTINGS)
    torch.testing.assert_close(run.solution(), oracle.solution(), rtol=1e-10, atol=1e-10)


def test_paths_are_evaluated_where_they_stand():
    a, b = two_batches()
    judge, _ = two_batches()
    run = debiased_conjugate_gradient(a, b, SETTINGS)
    values = run.evaluate(judge, damping=0.5)

    def value(point):
        return point @ (judge.operator @ point + 0.5 * point) / 2 + judge.gradient @ point

    for steps in (0, 4, 12):
        for path, point in (
            (values.same_batch, run.same_batch.solution(steps)),
            (values.debiased, run.solution(steps)),
            (values.double_size, run.double_size.solution(steps)),
        ):
            assert float(path[steps]) == pytest.approx(float(value(point)), rel=1e-8, abs=1e-10)


def test_curvatures_of_the_second_batch_are_unbiased_and_those_of_the_first_are_not():
    """Along a's directions the population's curvature is 1: the inputs are white."""
    ratios = {"a": [], "b": []}
    for _ in range(60):
        a, b = two_batches(examples=40, parameters=20)
        run = debiased_conjugate_gradient(a, b, ConjugateGradientSettings(iterations=1))
        square = run.same_batch.directions_PK.square().sum(0)
        ratios["a"].append(float(run.same_batch.curvatures / square))
        ratios["b"].append(float(run.held_out_curvatures / square))
    for name, biased in (("a", True), ("b", False)):
        values = torch.tensor(ratios[name])
        distance = float((values.mean() - 1).abs() / (values.std() / math.sqrt(len(values))))
        assert distance > 6 if biased else distance < 3


def test_stable_without_early_stopping_where_plain_runs_up():
    """Noisy regression, sixteen steps: the single batch ends far above its best, the debiased one does not."""
    full = quadratic(*regression(3000, 100, noise=6.0))
    rises = {"same_batch": [], "debiased": []}
    for _ in range(10):
        data = [regression(80, 100, noise=6.0) for _ in range(2)]
        run = debiased_conjugate_gradient(
            *(quadratic(*each) for each in data), ConjugateGradientSettings(iterations=16, damping=1e-2)
        )
        values = run.evaluate(full)
        for name, path in rises.items():
            path.append(float(getattr(values, name)[-1] - getattr(values, name).min()))
    assert sum(rises["debiased"]) < 0.2 * sum(rises["same_batch"])


class TestBadInput:
    @pytest.mark.parametrize("magnitudes", ALL)
    def test_curvature_that_is_not_positive_on_the_second_batch(self, magnitudes):
        a = BatchQuadratic(torch.eye(2), torch.ones(2))
        b = BatchQuadratic(torch.diag(torch.tensor([1.0, -3.0])), torch.ones(2))
        settings = ConjugateGradientSettings(damping=1e-3)
        shifted = BatchQuadratic(torch.diag(torch.tensor([3.0, 3.5])), torch.ones(2))
        run = debiased_conjugate_gradient(shifted, b, settings, magnitudes=magnitudes)
        assert run.solution(0).tolist() == [0.0, 0.0]
        with pytest.raises(
            SingularCurvatureError, match=r"not positive along 2 of 2 directions, first -2 along direction 0"
        ):
            run.solution()
        with pytest.raises(SingularCurvatureError, match=r"along the gradient is -0\.999 with damping=0\.001"):
            debiased_conjugate_gradient(
                BatchQuadratic(torch.diag(torch.tensor([1.0, -3.0])), torch.ones(2)), a, settings
            )

    def test_singular_without_damping(self):
        with pytest.raises(SingularCurvatureError, match=r"is 0 with damping=0\.0"):
            run_conjugate_gradient(torch.zeros(3, 3), torch.ones(3))

    def test_span_that_is_not_positive_definite(self):
        # Positive along both directions, (1, 1) and (2, -1), but not between them.
        gram = torch.diag(torch.tensor([1.0, -0.5]))
        a = BatchQuadratic(torch.diag(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 1.0]))
        run = debiased_conjugate_gradient(a, BatchQuadratic(gram, torch.ones(2)), magnitudes=Magnitudes.SUBSPACE)
        with pytest.raises(SingularCurvatureError, match="not positive definite on the span of 2 directions"):
            run.solution()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"iterations": 0}, "iterations must be a whole number of at least 1, but got 0"),
            ({"damping": -1.0}, r"damping must be a number of at least 0, but got -1\.0"),
            ({"damping": math.nan}, "damping must be a number of at least 0, but got nan"),
            ({"tolerance": 1.0}, r"tolerance must be in \[0, 1\), but got 1\.0"),
        ],
    )
    def test_settings(self, options, message):
        with pytest.raises(BudgetError, match=message):
            ConjugateGradientSettings(**options)

    def test_gradients(self):
        with pytest.raises(ShapeError, match=r"gradient must be a vector of 3 parameters, but got the shape \(2,\)"):
            BatchQuadratic(torch.eye(3), torch.ones(2))
        with pytest.raises(NonFiniteCurvatureError, match="1 entries of gradient are not finite"):
            run_conjugate_gradient(torch.eye(2), torch.tensor([1.0, math.inf]))

    def test_sizes(self):
        small, large = (BatchQuadratic(torch.eye(size), torch.ones(size)) for size in (2, 3))
        with pytest.raises(ShapeError, match="operator a is 2×2, but operator b is 3×3"):
            debiased_conjugate_gradient(small, large)
        with pytest.raises(ShapeError, match="the quadratic has 3 parameters, the directions 2"):
            debiased_conjugate_gradient(small, small).evaluate(large)

    def test_weights(self):
        known = BatchQuadratic(DenseOperator(torch.eye(2), example_count=7), torch.ones(2))
        with pytest.raises(BatchError, match="one batch has 7 examples"):
            merge_quadratics(known, BatchQuadratic(torch.eye(2), torch.ones(2)))

    def test_overlap(self):
        parts = [DenseOperator(torch.eye(2) * scale) for scale in (1.0, 2.0, 3.0)]
        a, b = (BatchQuadratic(MeanOperator(each), torch.ones(2)) for each in (parts[:2], parts[1:]))
        with pytest.raises(OverlapError, match="share 1 of 2 micro-batches"):
            debiased_conjugate_gradient(a, b)

    def test_steps_and_magnitudes(self):
        a = BatchQuadratic(torch.eye(2), torch.ones(2))
        run = debiased_conjugate_gradient(a, a)
        with pytest.raises(BudgetError, match="from 0 to 1, the number made, but got 2"):
            run.solution(2)
        with pytest.raises(BudgetError, match="but got 'diagonal'"):
            debiased_conjugate_gradient(a, a, magnitudes="diagonal")
