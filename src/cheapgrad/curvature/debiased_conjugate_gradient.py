"""Conjugate gradients whose directions come from one batch and whose step lengths come from another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.curvature.conjugate_gradient import (
    ConjugateGradientRun,
    ConjugateGradientSettings,
    Magnitudes,
    check_gradient,
    check_steps,
    run_conjugate_gradient,
)
from cheapgrad.curvature.finite_population import population_of
from cheapgrad.curvature.independence import check_independent, check_same_size
from cheapgrad.curvature.operators import AbstractOperator, MeanOperator, MicroBatch, as_operator
from cheapgrad.errors import BatchError, BudgetError, ShapeError, SingularCurvatureError, check_instance


@dataclass(frozen=True, eq=False)
class BatchQuadratic:
    """The damped quadratic of one batch: ``q(δ) = ½ δᵀ (H + damping) δ + gᵀ δ``.

    Args:
        operator: H: anything with ``shape`` and ``@``.
        gradient: g, ``[P]``.

    Raises:
        ShapeError: if the gradient does not fit.
        NonFiniteCurvatureError: if the gradient is not finite.
    """

    operator: Any
    gradient: Tensor

    def __post_init__(self) -> None:
        """Check that both fit."""
        object.__setattr__(self, "operator", as_operator(self.operator))
        check_gradient("gradient", self.gradient, self.operator)

    def restrict(self, directions_PK: Tensor, damping: float) -> tuple[Tensor, Tensor]:
        """Return slopes ``[K]`` at zero and the curvature ``[K, K]`` on the span of directions, in float64."""
        products_PK = self.operator @ directions_PK + damping * directions_PK
        gram_KK = (directions_PK.T.double() @ products_PK.double()).cpu()
        return (self.gradient.double() @ directions_PK.double()).cpu(), (gram_KK + gram_KK.T) / 2


@dataclass(frozen=True, eq=False)
class PathValues:
    """A quadratic, without its constant, after each step ``0 … K`` of the three paths.

    Attributes:
        same_batch: plain conjugate gradients on batch a.
        debiased: directions of a, magnitudes of b.
        double_size: plain conjugate gradients on both batches together: the baseline of the same data budget.
    """

    same_batch: Tensor
    debiased: Tensor
    double_size: Tensor


@dataclass(frozen=True, eq=False)
class DebiasedConjugateGradient:
    """A run of conjugate gradients with magnitudes from a second batch, beside the baseline of the same data budget.

    Attributes:
        same_batch: plain conjugate gradients on batch a, which gives the directions.
        double_size: plain conjugate gradients on both batches together.
        held_out_slopes: ``[K]``, the second batch's slope along each direction at zero.
        held_out_gram_KK: the second batch's damped curvature on the span of the directions. Its diagonal is the
            curvature along each; off the diagonal stands how far the directions are from conjugate on that batch.
        magnitudes: how step lengths are computed from them.
        damping: that of both batches.
        products: with batch a and with batch b, as counted.
    """

    same_batch: ConjugateGradientRun
    double_size: ConjugateGradientRun
    held_out_slopes: Tensor
    held_out_gram_KK: Tensor
    magnitudes: Magnitudes
    damping: float
    products: tuple[int, int]

    @property
    def held_out_curvatures(self) -> Tensor:
        """The second batch's damped curvature ``[K]`` along each direction."""
        return self.held_out_gram_KK.diagonal()

    def coefficients(self, steps: int | None = None) -> Tensor:
        """Return the debiased step lengths ``[steps]`` along the first directions.

        Args:
            steps: from 0 to the number of directions; all of them if left out.

        Raises:
            BudgetError: if there are fewer directions.
            SingularCurvatureError: if the second batch's curvature along one of them is not positive.
        """
        count = check_steps(steps, len(self.held_out_slopes))
        return _solve_small(self.held_out_slopes[:count], self.held_out_gram_KK[:count, :count], self.magnitudes)

    def solution(self, steps: int | None = None) -> Tensor:
        """Return the debiased iterate ``[P]`` after so many steps, all of them if left out.

        Args:
            steps: from 0 to the number of directions.

        Raises:
            BudgetError: if there are fewer directions.
            SingularCurvatureError: if the second batch's curvature along one of them is not positive.
        """
        lengths = self.coefficients(steps)
        directions_PK = self.same_batch.directions_PK[:, : len(lengths)]
        return directions_PK @ lengths.to(directions_PK)

    def evaluate(self, quadratic: BatchQuadratic, *, damping: float = 0.0) -> PathValues:
        """Return another quadratic, best that of data neither batch has seen, along all three paths.

        Args:
            quadratic: of the data to judge by.
            damping: of that quadratic, at least 0.

        Returns:
            Its values after 0, 1, … steps; lower is better. Nothing says that the debiased path ends lowest: look.

        Raises:
            ShapeError: if it has other parameters.
        """
        directions_PK = self.same_batch.directions_PK
        if quadratic.operator.shape[0] != directions_PK.shape[0]:
            raise ShapeError(
                f"the quadratic has {quadratic.operator.shape[0]} parameters, the directions {directions_PK.shape[0]}"
            )
        own = quadratic.restrict(directions_PK, damping)
        double = quadratic.restrict(self.double_size.directions_PK, damping)
        counts = range(len(self.held_out_slopes) + 1)
        return PathValues(
            same_batch=_values(*own, [self.same_batch.steps[:count] for count in counts]),
            debiased=_values(*own, [self.coefficients(count) for count in counts]),
            double_size=_values(
                *double, [self.double_size.steps[:count] for count in range(len(self.double_size.slopes) + 1)]
            ),
        )


def debiased_conjugate_gradient(
    quadratic_a: BatchQuadratic,
    quadratic_b: BatchQuadratic,
    settings: ConjugateGradientSettings | None = None,
    *,
    magnitudes: Magnitudes = Magnitudes.LINE_SEARCH,
    population_size: int | None = None,
) -> DebiasedConjugateGradient:
    """Run conjugate gradients on batch a, and take every step's length from batch b.

    Batch a gives directions ``p_1 … p_K`` (the plain method on ``H_a + damping``). Along them batch b gives slope and
    curvature; by default a second iterate δ goes, direction after direction, to b's minimum:

        step_k = -p_kᵀ (g_b + (H_b + damping) δ) / p_kᵀ (H_b + damping) p_k,    δ ← δ + step_k p_k

    The same number of steps is always made on both batches together as well: the fair baseline, which uses the same
    data and, early stopped, can do better.

    Args:
        quadratic_a: of the batch that chooses directions.
        quadratic_b: of the batch that measures along them; with the operator of `quadratic_a` it is the same batch.
        settings: iterations, damping and tolerance; the residual that stops is that of batch a.
        magnitudes: how step lengths follow from slopes and curvatures.
        population_size: examples in the data set, if the batches are disjoint draws from it without replacement: the
            magnitudes are then those of the corrected quadratic ``(A/N) q_a + ((N-A)/N) q_b``. None otherwise.

    Returns:
        Slopes and curvatures of both batches along each direction, the debiased iterates and the baseline.

    Law:
        Given a, the second batch's slopes at zero and curvatures are unbiased, their ratio is not (an inverse of a
        random number); `correct_inverse` removes its first order. With a = b (the same operator and gradient), or with
        the full batch and its population size, this *is* plain conjugate gradients. Not an unbiased solution: the
        directions are still a's. Cost: two products with each batch a step, half of them for the baseline.

    Raises:
        SingularCurvatureError: if the curvature along the gradient of a, or of both, is not positive.
        ShapeError: if both quadratics differ in size.
        BatchError: if only one operator knows its number of examples, or `population_size` is given and none does.
        OverlapError: if the batches share micro-batches, or cannot be disjoint in the population.

    Example:
        >>> a = BatchQuadratic(torch.diag(torch.tensor([1.0, 4.0])), torch.tensor([2.0, 4.0]))
        >>> b = BatchQuadratic(torch.diag(torch.tensor([2.0, 4.0])), torch.tensor([2.0, 4.0]))
        >>> debiased_conjugate_gradient(a, b, magnitudes=Magnitudes.SUBSPACE).solution()
        tensor([-1.0000, -1.0000])

    References:
        Directions from one batch, magnitudes from another: arXiv:2410.14325. Where the slope is taken, how damping
        enters and when to stop are our choices.
    """
    settings = ConjugateGradientSettings() if settings is None else settings
    check_instance("settings", settings, ConjugateGradientSettings, "use ConjugateGradientSettings(...)")
    for name, quadratic in (("quadratic_a", quadratic_a), ("quadratic_b", quadratic_b)):
        check_instance(name, quadratic, BatchQuadratic, "use BatchQuadratic(operator, gradient)")
    a, b = quadratic_a.operator, quadratic_b.operator
    check_same_size(a, b)
    if not isinstance(magnitudes, Magnitudes):
        raise BudgetError(f"magnitudes must be one of {[str(each) for each in Magnitudes]}, but got {magnitudes!r}")
    population = None
    if a is not b:
        check_independent(a, b)
        population = population_of(a, b, population_size)
    run = run_conjugate_gradient(a, quadratic_a.gradient, settings)
    slopes_K, gram_KK = quadratic_b.restrict(run.directions_PK, settings.damping)
    products_a = len(run.slopes)
    if population is not None:
        own_slopes_K, own_gram_KK = quadratic_a.restrict(run.directions_PK, settings.damping)
        products_a += len(run.slopes)
        slopes_K = population.combine(own_slopes_K, slopes_K)
        gram_KK = population.combine(own_gram_KK, gram_KK)
    double = merge_quadratics(quadratic_a, quadratic_b)
    baseline = run_conjugate_gradient(double.operator, double.gradient, settings)
    return DebiasedConjugateGradient(
        same_batch=run,
        double_size=baseline,
        held_out_slopes=slopes_K,
        held_out_gram_KK=gram_KK,
        magnitudes=magnitudes,
        damping=settings.damping,
        products=(products_a + len(baseline.slopes), len(run.slopes) + len(baseline.slopes)),
    )


def merge_quadratics(quadratic_a: BatchQuadratic, quadratic_b: BatchQuadratic) -> BatchQuadratic:
    """Return the quadratic of both batches together, weighted by their numbers of examples.

    Args:
        quadratic_a: one batch.
        quadratic_b: the other one; the same operator means the same batch, which then is returned as it is.

    Law:
        Equal weights where neither operator knows its number of examples.

    Raises:
        BatchError: if only one of them knows it.

    Example:
        >>> a, b = (BatchQuadratic(size * torch.eye(2), torch.ones(2)) for size in (1.0, 3.0))
        >>> merge_quadratics(a, b).operator @ torch.ones(2)
        tensor([2., 2.])
    """
    a, b = quadratic_a.operator, quadratic_b.operator
    if a is b:
        return quadratic_a
    weights = [_examples(a), _examples(b)]
    if (weights[0] is None) != (weights[1] is None):
        raise BatchError(
            f"one batch has {weights[0] or weights[1]:g} examples, the other does not know its number, so they cannot "
            "be weighted; wrap it: MeanOperator([MicroBatch(as_operator(matrix), 1.0, examples)])"
        )
    shares = [float(weight or 1.0) for weight in weights]
    parts = [MicroBatch(each, share, weight) for each, share, weight in zip((a, b), shares, weights, strict=True)]
    total = sum(shares)
    gradient = quadratic_a.gradient * (shares[0] / total) + quadratic_b.gradient * (shares[1] / total)
    return BatchQuadratic(MeanOperator(parts), gradient)


def _examples(operator: AbstractOperator) -> float | None:
    return operator.example_count


def _solve_small(slopes_K: Tensor, gram_KK: Tensor, magnitudes: Magnitudes) -> Tensor:
    """Return step lengths from slopes at zero and curvatures of the magnitude batch."""
    curvatures_K = gram_KK.diagonal()
    bad = int((~(curvatures_K > 0)).sum())
    if bad:
        first = int((~(curvatures_K > 0)).nonzero()[0])
        raise SingularCurvatureError(
            f"the second batch's damped curvature is not positive along {bad} of {len(curvatures_K)} directions, first "
            f"{float(curvatures_K[first]):.3g} along direction {first}; increase the damping, take fewer steps, or use "
            "a positive semi-definite curvature such as Gauss-Newton"
        )
    if magnitudes is Magnitudes.DIAGONAL:
        return -slopes_K / curvatures_K
    if magnitudes is Magnitudes.LINE_SEARCH:
        # Forward substitution: each step sees the gradient that the earlier ones have left.
        return torch.linalg.solve_triangular(gram_KK.tril(), -slopes_K.unsqueeze(1), upper=False).squeeze(1)
    return solve_subspace(slopes_K, gram_KK)


def solve_subspace(slopes_K: Tensor, gram_KK: Tensor) -> Tensor:
    """Return the minimum over the whole span; raise `SingularCurvatureError` where there is none."""
    # Scaled to a unit diagonal: the directions of conjugate gradients differ in length by orders of magnitude.
    scale_K = gram_KK.diagonal().rsqrt()
    factor_KK, failed = torch.linalg.cholesky_ex(gram_KK * scale_K * scale_K.unsqueeze(1))
    if int(failed):
        raise SingularCurvatureError(
            f"the second batch's damped curvature is not positive definite on the span of {len(slopes_K)} directions; "
            "increase the damping, or take steps one direction at a time (Magnitudes.LINE_SEARCH)"
        )
    return scale_K * torch.cholesky_solve((-slopes_K * scale_K).unsqueeze(1), factor_KK).squeeze(1)


def _values(slopes_K: Tensor, gram_KK: Tensor, coefficients: list[Tensor]) -> Tensor:
    values = []
    for lengths in coefficients:
        count = len(lengths)
        values.append(lengths @ slopes_K[:count] + lengths @ gram_KK[:count, :count] @ lengths / 2)
    return torch.stack(values)
