"""Slope and curvature along directions that one batch chose, measured on another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.curvature._confidence import check_level, student_quantile
from cheapgrad.curvature.finite_population import FinitePopulation
from cheapgrad.curvature.operators import AbstractOperator
from cheapgrad.errors import NonFiniteCurvatureError, OperandError, ShapeError


@dataclass(frozen=True, eq=False)
class DirectionalEstimates:
    """One quantity (slope or curvature) along K directions, on the batch that chose them and on another.

    Attributes:
        same_batch: ``[K]``, on batch a, which chose the directions: too large for leading ones on average.
        held_out: ``[K]``, on batch b.
        corrected: ``[K]``, `held_out` with the correction for a finite population; `held_out` itself without one.
        standard_error: ``[K]``, of `corrected`, given the directions; NaN where b has a single micro-batch.
        micro_batches: how many of b the standard error was computed over.
    """

    same_batch: Tensor
    held_out: Tensor
    corrected: Tensor
    standard_error: Tensor
    micro_batches: int

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return the ends ``[K]`` of confidence intervals of `corrected`, each one at `level`.

        Args:
            level: probability that one of them holds the true value, in (0, 1).

        Law:
            Student's t over the micro-batches of b, given the directions: exact where a micro-batch's value is normal.
            Infinitely wide where b has a single micro-batch, unless the population leaves nothing to be uncertain of.

        Raises:
            BudgetError: if `level` is out of range.
        """
        half = student_quantile(check_level(level), self.micro_batches - 1) * self.standard_error
        # Nothing uncertain has no width, however few micro-batches there are.
        half = torch.where(self.standard_error == 0, 0.0, torch.where(half.isnan(), math.inf, half))
        return self.corrected - half, self.corrected + half

    def to_dict(self) -> dict[str, Any]:
        """Return the estimates as JSON-able data; NaN becomes None."""
        tensors = {name: getattr(self, name).tolist() for name in ("same_batch", "held_out", "corrected")}
        errors = [None if math.isnan(error) else error for error in self.standard_error.tolist()]
        return tensors | {"standard_error": errors, "micro_batches": self.micro_batches}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DirectionalEstimates:
        """Return what `to_dict` was made from."""
        values = {name: _as_tensor(data[name]) for name in ("same_batch", "held_out", "corrected", "standard_error")}
        return cls(**values, micro_batches=data["micro_batches"])


def _as_tensor(values: list[float | None]) -> Tensor:
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)


def measure_curvature_along(
    directions_PK: Tensor,
    operator_a: AbstractOperator,
    operator_b: AbstractOperator,
    *,
    population: FinitePopulation | None = None,
) -> DirectionalEstimates:
    """Return ``dᵀ H d`` along given directions, on both batches.

    Args:
        directions_PK: ``[P, K]``, of any length, chosen by batch a or fixed beforehand.
        operator_a: curvature of batch a.
        operator_b: curvature of batch b; its micro-batches give the standard error.
        population: for the correction of batches drawn without replacement; None for independent ones.

    Law:
        ``E[held_out | a] = dᵀ H d`` for independent batches, whatever d does with a; along directions fixed beforehand
        `same_batch` is unbiased as well. Cost: K products with each operator.

    Raises:
        ShapeError: if the directions do not fit the operators.
        NonFiniteCurvatureError: if the directions are not finite.

    Example:
        >>> from cheapgrad.curvature import DenseOperator
        >>> estimates = measure_curvature_along(
        ...     torch.eye(2), DenseOperator(torch.eye(2)), DenseOperator(3 * torch.eye(2))
        ... )
        >>> estimates.same_batch, estimates.held_out
        (tensor([1., 1.], dtype=torch.float64), tensor([3., 3.], dtype=torch.float64))
    """
    check_directions(directions_PK, operator_a, operator_b)
    same_batch = _quadratic_form(directions_PK, operator_a)
    parts = operator_b.micro_batches
    values_BK = torch.stack([_quadratic_form(directions_PK, part.operator) for part in parts])
    return combine_parts(same_batch, values_BK, [part.weight for part in parts], population)


def measure_slope_along(
    directions_PK: Tensor,
    gradient_a: Tensor,
    gradient_b: Tensor,
    *,
    weights: list[float] | None = None,
    population: FinitePopulation | None = None,
) -> DirectionalEstimates:
    """Return ``dᵀ g`` along given directions, on both batches.

    Args:
        directions_PK: ``[P, K]``, of any length.
        gradient_a: ``[P]``, of batch a.
        gradient_b: ``[P]``, of batch b, or ``[B, P]``, one row for each of its micro-batches.
        weights: of the micro-batches, summing to one; equal if left out.
        population: for the correction of batches drawn without replacement; None for independent ones.

    Law:
        ``E[held_out | a] = dᵀ g``. With ``d = g_a``, `same_batch` is ``‖g_a‖²``, whose mean is
        ``‖g‖² + (tr C / A)·(N - A) / (N - 1)`` with C the covariance of examples' gradients; `held_out` has the mean
        ``‖g‖²`` for independent batches, and ``‖g‖² - tr C / (N - 1)`` for disjoint ones, which `corrected` undoes
        given a.

    Raises:
        ShapeError: if the gradients do not fit the directions, or each other's weights.
        OperandError: if they are of another dtype or device than the directions.
        NonFiniteCurvatureError: if a gradient is not finite.

    Example:
        >>> gradient_a = torch.tensor([3.0, 4.0])
        >>> measure_slope_along(gradient_a[:, None], gradient_a, torch.tensor([3.0, 3.0])).held_out
        tensor([21.], dtype=torch.float64)
    """
    check_gradients(gradient_a, gradient_b, directions_PK)
    rows_BP = torch.atleast_2d(gradient_b)
    weights = weights or [1 / len(rows_BP)] * len(rows_BP)
    if len(weights) != len(rows_BP):
        raise ShapeError(f"gradient_b has {len(rows_BP)} rows, but batch b has {len(weights)} micro-batches")
    same_batch = (gradient_a @ directions_PK).double().cpu()
    return combine_parts(same_batch, (rows_BP @ directions_PK).double().cpu(), weights, population)


def combine_parts(
    same_batch: Tensor, values_BK: Tensor, weights: list[float], population: FinitePopulation | None
) -> DirectionalEstimates:
    """Return the estimates from b's values per micro-batch.

    Args:
        same_batch: ``[K]``.
        values_BK: one row for each of b's micro-batches.
        weights: of the micro-batches, summing to one.
        population: or None for independent batches.

    Law:
        The squared standard error ``Σ w_m (c_m - c)² / (M - 1)`` is unbiased where a micro-batch's variance is
        inversely proportional to its weight, as it is for means over examples.
    """
    share = torch.tensor(weights, dtype=torch.float64).unsqueeze(1)
    held_out = (share * values_BK).sum(0)
    count = len(weights)
    if count > 1:
        standard_error = ((share * (values_BK - held_out).square()).sum(0) / (count - 1)).sqrt()
    else:
        standard_error = torch.full_like(held_out, math.nan)
    if population is None:
        return DirectionalEstimates(same_batch, held_out, held_out, standard_error, count)
    # Zero where the first batch is everything: nothing is left to be uncertain about, also with one micro-batch.
    factor = population.error_factor
    error = standard_error * factor if factor else torch.zeros_like(standard_error)
    return DirectionalEstimates(same_batch, held_out, population.combine(same_batch, held_out), error, count)


def check_directions(directions_PK: Tensor, *operators: AbstractOperator) -> None:
    """Raise unless the directions are finite columns that fit all operators."""
    for operator in operators:
        if directions_PK.ndim != 2 or directions_PK.shape[0] != operator.shape[0]:
            raise ShapeError(
                f"directions must be columns [{operator.shape[0]}, K], but got the shape {tuple(directions_PK.shape)}; "
                "for a single direction use direction[:, None]"
            )
    if not torch.isfinite(directions_PK).all():
        raise NonFiniteCurvatureError(
            f"{int((~torch.isfinite(directions_PK)).sum())} entries of the directions are not finite; "
            "look at where they were computed"
        )


def check_gradients(gradient_a: Tensor, gradient_b: Tensor, directions_PK: Tensor) -> None:
    """Raise unless both batches' gradients are finite, and fit the directions in size, dtype and device."""
    size = directions_PK.shape[0]
    for name, gradient, ranks in (("gradient_a", gradient_a, {1}), ("gradient_b", gradient_b, {1, 2})):
        if gradient.ndim not in ranks or gradient.shape[-1] != size:
            raise ShapeError(
                f"{name} must be a vector of {size} parameters (gradient_b also one row for each micro-batch), but got "
                f"shapes {tuple(gradient_a.shape)} and {tuple(gradient_b.shape)}"
            )
        if gradient.dtype != directions_PK.dtype or gradient.device != directions_PK.device:
            raise OperandError(
                f"{name} is of {gradient.dtype} on {gradient.device}, the directions are of {directions_PK.dtype} on "
                f"{directions_PK.device}; use {name}.to({directions_PK.device.type!r}, {directions_PK.dtype})"
            )
        bad = int((~torch.isfinite(gradient)).sum())
        if bad:
            raise NonFiniteCurvatureError(f"{bad} entries of {name} are not finite; look at the loss")


def _quadratic_form(directions_PK: Tensor, operator: AbstractOperator) -> Tensor:
    return (directions_PK * (operator @ directions_PK)).sum(0).double().cpu()
