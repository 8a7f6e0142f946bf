"""Directions from one batch, magnitudes from another: curvature that is not biased by its own mini-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.curvature.conjugate_gradient import check_damping
from cheapgrad.curvature.directional_estimates import (
    DirectionalEstimates,
    check_gradients,
    measure_curvature_along,
    measure_slope_along,
)
from cheapgrad.curvature.finite_population import FinitePopulation, population_of
from cheapgrad.curvature.independence import check_independent, check_same_size
from cheapgrad.curvature.inverse_correction import correct_inverse
from cheapgrad.curvature.leading_directions import find_leading_directions
from cheapgrad.curvature.operators import as_operator
from cheapgrad.errors import ArgumentError, describe_value


@dataclass(frozen=True, eq=False)
class SplitSample:
    """Curvature, and slope where gradients were given, along directions that batch a chose.

    Attributes:
        directions_PK: unit directions ``[P, K]``; where gradients were given, each one points uphill on batch a.
        curvature: along them, on both batches.
        slope: along them, on both batches; None without gradients.
        population: what both batches were drawn from; None for independent ones.
    """

    directions_PK: Tensor
    curvature: DirectionalEstimates
    slope: DirectionalEstimates | None
    population: FinitePopulation | None

    @property
    def same_batch(self) -> Tensor:
        """Curvature ``[K]`` on the batch that chose the directions: its own eigenvalues, biased."""
        return self.curvature.same_batch

    @property
    def held_out(self) -> Tensor:
        """Curvature ``[K]`` along the same directions on the other batch."""
        return self.curvature.held_out

    @property
    def corrected(self) -> Tensor:
        """`held_out` with the correction for a finite population; `held_out` itself without one."""
        return self.curvature.corrected

    @property
    def standard_error(self) -> Tensor:
        """Of `corrected`, over the micro-batches of b, given the directions; NaN where there is only one."""
        return self.curvature.standard_error

    def inverse(self, damping: float = 0.0) -> Tensor:
        """Return ``1 / (curvature + damping)``, ``[K]``, corrected for the bias that inverting adds; `correct_inverse`.

        Args:
            damping: added to the curvature, at least 0.

        Law:
            Unbiased to first order given the directions, as `correct_inverse` says.

        Raises:
            BudgetError: if the damping is out of range.
            BatchError: if there is no standard error: batch b has a single micro-batch.
            SingularCurvatureError: if a damped curvature is exactly zero, and certain.
        """
        check_damping(damping)
        return correct_inverse(self.corrected + damping, self.standard_error.square())

    def to_dict(self) -> dict[str, Any]:
        """Return the magnitudes, without the directions, as JSON-able data."""
        return {
            "curvature": self.curvature.to_dict(),
            "slope": None if self.slope is None else self.slope.to_dict(),
            "population": None if self.population is None else vars(self.population) | {},
        }


def split_sample(
    operator_a: Any,
    operator_b: Any,
    count: int,
    *,
    gradients: tuple[Tensor, Tensor] | None = None,
    population_size: int | None = None,
    largest: bool = True,
) -> SplitSample:
    """Return the curvature along batch a's leading directions, without the bias of having chosen them there.

    The top eigenvectors û of a batch's curvature H_a fit that batch: ``ûᵀ H_a û`` exceeds ``ûᵀ H û`` on average, and
    for the largest one ``E λ_max(H_a) ≥ λ_max(H) ≥ E[ûᵀ H û]``. A batch b that had no part in the choice measures
    ``ûᵀ H_b û``, whose mean given û is ``ûᵀ H û``. The same holds for slopes ``ûᵀ g``.

    Args:
        operator_a: curvature of the batch that chooses directions: anything with ``shape`` and ``@``.
        operator_b: curvature of the batch that measures along them. Its micro-batches give the standard error, so a
            single one gives none.
        count: K directions, from 1 to the number of parameters.
        gradients: of both batches: ``[P]`` for a; ``[P]`` or, for standard errors, ``[B, P]`` for b, one row for each
            of its micro-batches.
        population_size: examples in the data set, if both batches were drawn from it without replacement and are
            disjoint; None for independent batches. The operators must then know their `example_count`.
        largest: the directions of largest curvature; else those of the smallest.

    Returns:
        Per direction `same_batch`, `held_out`, `corrected` and `standard_error`; the same of slopes in `slope`.

    Law:
        Bias of `corrected` given a: 0, for any a. Variance: that of one quadratic form on b, its standard error is
        reported. The *selection* stays: these are directions that a found, not the eigenvectors of all data, and
        ``ûᵀ H û`` is below the top eigenvalue of H. Cost: the eigenvectors on a, then K products with a and K with b.
        Fails where b shares examples with a.

    Raises:
        OperatorError: if an operator has no shape or no ``@``.
        OverlapError: if the operators share micro-batches, or cannot be disjoint in the population.
        BudgetError: if `count` is out of range.
        BatchError: if `population_size` is given, but an operator does not know its number of examples.
        ShapeError: if gradients or operators do not fit.
        ArgumentError: if `gradients` is no pair of tensors.
        OperandError: if gradients are of another dtype or device than the curvature.
        NonFiniteCurvatureError: if a product or a gradient is not finite.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> a, b = (torch.randn(50, size, generator=generator, dtype=torch.float64) for size in (100, 1000))
        >>> sample = split_sample(a @ a.T / 100, b @ b.T / 1000, 1)  # the curvature of all data is 1 everywhere
        >>> round(float(sample.same_batch), 1), round(float(sample.held_out), 1)
        (2.6, 1.0)

    References:
        Two batches, one for directions and one for magnitudes, are the remedy of arXiv:2410.14325; the correction for
        finite populations and the standard errors are ours.
    """
    operator_a, operator_b = as_operator(operator_a), as_operator(operator_b)
    check_same_size(operator_a, operator_b)
    check_independent(operator_a, operator_b)
    population = population_of(operator_a, operator_b, population_size)
    _, directions_PK = find_leading_directions(operator_a, count, largest=largest)
    slope = None
    if gradients is not None:
        gradient_a, gradient_b = _unpack_gradients(gradients)
        check_gradients(gradient_a, gradient_b, directions_PK)
        # An eigenvector has no sign of its own; batch a chooses it, like everything about a direction.
        uphill_K = torch.where(gradient_a @ directions_PK < 0, -1.0, 1.0).to(directions_PK.dtype)
        directions_PK = directions_PK * uphill_K
        weights = None if gradient_b.ndim == 1 else [part.weight for part in operator_b.micro_batches]
        slope = measure_slope_along(directions_PK, gradient_a, gradient_b, weights=weights, population=population)
    curvature = measure_curvature_along(directions_PK, operator_a, operator_b, population=population)
    return SplitSample(directions_PK, curvature, slope, population)


def _unpack_gradients(gradients: Any) -> tuple[Tensor, Tensor]:
    is_pair = isinstance(gradients, (tuple, list)) and len(gradients) == 2
    if not is_pair or not all(isinstance(gradient, Tensor) for gradient in gradients):
        raise ArgumentError(
            f"gradients must be a pair of tensors (gradient_a, gradient_b), but got {describe_value(gradients)}"
        )
    return gradients[0], gradients[1]
