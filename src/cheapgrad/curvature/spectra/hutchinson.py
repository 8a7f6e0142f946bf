"""Trace, diagonal and Frobenius norm from products with random signs."""

from __future__ import annotations

import math
from typing import Any

import torch

from cheapgrad.curvature.spectra.estimates import ScalarEstimate, VectorEstimate, summarize_draws
from cheapgrad.curvature.spectra.probes import check_probes, multiply_signs


def hutchinson_trace(operator: Any, *, probes: int = 32, generator: torch.Generator | None = None) -> ScalarEstimate:
    """Estimate the trace as the mean of ``zᵀAz`` over random signs z.

    Args:
        operator: anything with ``shape`` and ``@``.
        probes: draws, at least 2.
        generator: of the draws; torch's default otherwise. Processes of a group need equal ones.

    Returns:
        The estimate, with the standard error of the mean.

    Law:
        Unbiased. The variance of one draw is ``2 Σ_{i≠j} A_ij²``: nothing for a diagonal matrix. One product a draw.

    Raises:
        BudgetError: if there are fewer than two probes.

    Example:
        >>> from cheapgrad.curvature import DenseOperator
        >>> print(hutchinson_trace(DenseOperator(torch.diag(torch.tensor([1.0, 2.0]))), probes=4))
        3 ± 0 (4 products, hutchinson_trace)

    References:
        Hutchinson, A stochastic estimator of the trace of the influence matrix, 1989.
    """
    operator = check_probes(operator, "probes", probes)
    forms = [(signs_PR * product_PR).sum(0) for signs_PR, product_PR in multiply_signs(operator, probes, generator)]
    return summarize_draws(torch.cat(forms), probes, "hutchinson_trace")


def hutchinson_diagonal(operator: Any, *, probes: int = 32, generator: torch.Generator | None = None) -> VectorEstimate:
    """Estimate the diagonal as the mean of ``z ⊙ Az`` over random signs z.

    Args:
        operator: anything with ``shape`` and ``@``.
        probes: draws, at least 2.
        generator: of the draws; torch's default otherwise. Processes of a group need equal ones.

    Returns:
        The estimate ``[P]``, with the standard error of each entry.

    Law:
        Unbiased. The variance of one draw's entry i is ``Σ_{j≠i} A_ij²``. One product a draw.

    Raises:
        BudgetError: if there are fewer than two probes.

    References:
        Bekas, Kokiopoulou, Saad, An estimator for the diagonal of a matrix, 2007.
    """
    operator = check_probes(operator, "probes", probes)
    total_P = torch.zeros(operator.shape[0], dtype=operator.dtype, device=operator.device)
    squares_P = torch.zeros_like(total_P)
    shift_P = None
    for signs_PR, product_PR in multiply_signs(operator, probes, generator):
        draws_PR = signs_PR * product_PR
        # Squares are summed about a draw, so that a small spread about a large entry is not lost in rounding.
        shift_P = draws_PR[:, 0].clone() if shift_P is None else shift_P
        draws_PR -= shift_P[:, None]
        total_P += draws_PR.sum(1)
        squares_P += draws_PR.square().sum(1)
    mean_P = total_P / probes
    variance_P = (squares_P - probes * mean_P.square()).clamp(min=0) / (probes - 1)
    values_P = mean_P if shift_P is None else mean_P + shift_P
    return VectorEstimate(values_P, (variance_P / probes).sqrt(), probes, "hutchinson_diagonal")


def frobenius_norm(operator: Any, *, probes: int = 32, generator: torch.Generator | None = None) -> ScalarEstimate:
    """Estimate ``‖A‖_F`` as the root of the mean of ``‖Az‖²`` over random signs z.

    Args:
        operator: anything with ``shape`` and ``@``.
        probes: draws, at least 2.
        generator: of the draws; torch's default otherwise. Processes of a group need equal ones.

    Returns:
        The estimate, with the standard error by the delta method.

    Law:
        The square is unbiased; the root is too small by about ``standard_error² / (2 ‖A‖_F)``. One product a draw.

    Raises:
        BudgetError: if there are fewer than two probes.
    """
    operator = check_probes(operator, "probes", probes)
    squares = [product_PR.square().sum(0) for _, product_PR in multiply_signs(operator, probes, generator)]
    square = summarize_draws(torch.cat(squares), probes, "frobenius_norm")
    value = math.sqrt(square.value)
    error = square.standard_error / (2 * value) if value else 0.0
    return ScalarEstimate(value, error, probes, "frobenius_norm")
