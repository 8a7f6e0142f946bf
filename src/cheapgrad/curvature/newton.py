"""Newton steps in a batch's leading directions, with slopes and curvatures from another batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cheapgrad.curvature.conjugate_gradient import check_damping
from cheapgrad.curvature.debiased_conjugate_gradient import BatchQuadratic, merge_quadratics, solve_subspace
from cheapgrad.curvature.finite_population import population_of
from cheapgrad.curvature.inverse_correction import correct_inverse
from cheapgrad.curvature.leading_directions import find_leading_directions
from cheapgrad.curvature.split_sample import SplitSample, split_sample
from cheapgrad.errors import SingularCurvatureError


@dataclass(frozen=True, eq=False)
class NewtonStep:
    """A Newton step within K leading directions of batch a, three times.

    Attributes:
        same_batch: ``[P]``, all from batch a.
        debiased: ``[P]``, slopes and curvatures from batch b.
        double_size: ``[P]``, all from both batches together: the baseline of the same data budget.
        sample: slopes and curvatures along the directions of a.
    """

    same_batch: Tensor
    debiased: Tensor
    double_size: Tensor
    sample: SplitSample


def debiased_newton_step(
    quadratic_a: BatchQuadratic,
    quadratic_b: BatchQuadratic,
    count: int,
    *,
    damping: float,
    whole_subspace: bool = False,
    population_size: int | None = None,
) -> NewtonStep:
    """Return ``δ = -Σ_k û_k (û_kᵀ g) / (û_kᵀ H û_k + damping)`` with the directions of a and the magnitudes of b.

    Orthogonally to the K directions the step is zero: add a gradient step there if you want one.

    Args:
        quadratic_a: of the batch whose top eigenvectors are the directions.
        quadratic_b: of the batch that gives slopes and curvatures. With at least two micro-batches the bias of the
            inverse is corrected as well.
        count: K, from 1 to the number of parameters.
        damping: added to curvatures, at least 0.
        whole_subspace: solve ``(Ûᵀ H_b Û + damping) x = -Ûᵀ g_b`` in place of K separate divisions; the eigenvectors of
            a do not diagonalise b's curvature. Without correction of the inverse.
        population_size: examples in the data set, if the batches are disjoint draws from it without replacement.

    Returns:
        The debiased step, that of batch a alone, and that of both batches together.

    Law:
        Given a, slopes and curvatures of b are unbiased, the quotient is so to first order where its correction is
        possible. Cost: the leading eigenvectors of a and, for the baseline, of both batches; K products with each.

    Raises:
        SingularCurvatureError: if a damped curvature is not positive.
        BudgetError: if `count` or `damping` is out of range.
        OverlapError: if the batches share micro-batches, or cannot be disjoint in the population.

    Example:
        >>> a = BatchQuadratic(torch.diag(torch.tensor([5.0, 1.0])), torch.tensor([1.0, 1.0]))
        >>> b = BatchQuadratic(torch.diag(torch.tensor([4.0, 1.0])), torch.tensor([2.0, 1.0]))
        >>> debiased_newton_step(a, b, 1, damping=0.0).debiased
        tensor([-0.5000, 0.0000])
    """
    check_damping(damping)
    gradients = (quadratic_a.gradient, quadratic_b.gradient)
    sample = split_sample(
        quadratic_a.operator, quadratic_b.operator, count, gradients=gradients, population_size=population_size
    )
    slope = sample.slope
    assert slope is not None  # gradients were given
    directions_PK = sample.directions_PK
    if whole_subspace:
        slopes_K, gram_KK = quadratic_b.restrict(directions_PK, damping)
        population = population_of(quadratic_a.operator, quadratic_b.operator, population_size)
        if population is not None:
            own_slopes_K, own_gram_KK = quadratic_a.restrict(directions_PK, damping)
            slopes_K, gram_KK = population.combine(own_slopes_K, slopes_K), population.combine(own_gram_KK, gram_KK)
        _check_positive(gram_KK.diagonal(), "b", damping)
        lengths = solve_subspace(slopes_K, gram_KK)
    else:
        curvatures = sample.corrected + damping
        _check_positive(curvatures, "b", damping)
        known = not bool(sample.standard_error.isnan().any())
        variances = sample.standard_error.square() if known else torch.zeros_like(curvatures)
        lengths = -slope.corrected * correct_inverse(curvatures, variances)
    _check_positive(sample.same_batch + damping, "a", damping)
    own_lengths = -slope.same_batch / (sample.same_batch + damping)
    return NewtonStep(
        same_batch=directions_PK @ own_lengths.to(directions_PK),
        debiased=directions_PK @ lengths.to(directions_PK),
        double_size=_plain_step(merge_quadratics(quadratic_a, quadratic_b), count, damping),
        sample=sample,
    )


def _plain_step(quadratic: BatchQuadratic, count: int, damping: float) -> Tensor:
    """Return the step within one batch's own leading directions."""
    values_K, directions_PK = find_leading_directions(quadratic.operator, count)
    _check_positive(values_K.double().cpu() + damping, "of double size", damping)
    return -directions_PK @ ((quadratic.gradient @ directions_PK) / (values_K + damping))


def _check_positive(curvatures_K: Tensor, batch: str, damping: float) -> None:
    bad = ~(curvatures_K > 0)
    if bad.any():
        raise SingularCurvatureError(
            f"the damped curvature of batch {batch} is {float(curvatures_K[bad][0]):.3g} along direction "
            f"{int(bad.nonzero()[0])} of {len(curvatures_K)} (damping={damping!r}); increase the damping, ask for "
            "fewer directions, or use a positive semi-definite curvature such as Gauss-Newton"
        )
