"""Trace and diagonal by leaving each of the probes out of the sketch in turn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.curvature.operators import AbstractOperator
from cheapgrad.curvature.spectra.estimates import ScalarEstimate, VectorEstimate
from cheapgrad.curvature.spectra.probes import check_probes, check_within, draw_signs


@dataclass(frozen=True)
class _Sketch:
    """Signs Ω, ``Y = AΩ = QR``, ``Z = AQ``, and the directions ``s_i`` that leave column i of Y out of the span of Q.

    ``Q (I − s_i s_iᵀ) Qᵀ`` projects on all columns of Y but the i-th; ``s_i`` is column i of ``R⁻ᵀ`` at unit length.
    """

    signs_PK: Tensor
    images_PK: Tensor
    basis_PK: Tensor
    basis_images_PK: Tensor
    left_out_KK: Tensor


def _draw_sketch(operator: AbstractOperator, count: int, generator: torch.Generator | None) -> _Sketch:
    signs_PK = draw_signs(operator, count, generator)
    images_PK = operator @ signs_PK
    basis_PK, triangle_KK = torch.linalg.qr(images_PK)
    # Directions that the matrix does not reach have no row in R to invert: any number far below the others will do.
    diagonal = triangle_KK.diagonal()
    floor = diagonal.abs().max().clamp(min=1e-30) * torch.finfo(diagonal.dtype).eps
    diagonal.copy_(torch.where(diagonal.abs() < floor, floor, diagonal))
    unit_KK = torch.eye(count, dtype=operator.dtype, device=operator.device)
    left_out_KK = torch.linalg.solve_triangular(triangle_KK, unit_KK, upper=True).T
    left_out_KK = left_out_KK / left_out_KK.norm(dim=0)
    return _Sketch(signs_PK, images_PK, basis_PK, operator @ basis_PK, left_out_KK)


def xtrace(operator: Any, *, products: int = 48, generator: torch.Generator | None = None) -> ScalarEstimate:
    """Estimate the trace, using every probe both for the sketch and for the rest, but never for both at once.

    With the projection ``P_i`` on ``A ω_j, j ≠ i``, the estimate is the mean over i of
    ``tr(P_i A P_i) + ω_iᵀ (I − P_i) A (I − P_i) ω_i``.

    Args:
        operator: anything with ``shape`` and ``@``.
        products: to be spent, at least 4; half for the probes, half for the basis.
        generator: of the draws; torch's default otherwise. Processes of a group need equal ones.

    Returns:
        The estimate, with a standard error by the jackknife: from the estimates that leave one probe out altogether.

    Law:
        Unbiased, since ω_i is independent of ``P_i``, and more accurate than Hutch++ at equal products where
        eigenvalues decay fast. The standard error is too large in the mean, up to about twice where they decay slowly.

    Raises:
        BudgetError: if there are fewer than four products, or more than two for each dimension.

    Example:
        >>> from cheapgrad.curvature import DenseOperator
        >>> v = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
        >>> round(xtrace(DenseOperator(torch.outer(v, v)), products=6).value, 6)
        39.0

    References:
        Epperly, Tropp, Webber, XTrace: making the most of every sample in stochastic trace estimation, SIMAX 2024.
    """
    operator = check_probes(operator, "products", products, minimum=4)
    count = products // 2
    check_within(operator, "products", products, share=2)
    small = _restrict(_draw_sketch(operator, count, generator))
    value = float(_trace_terms(small).mean())
    shorter = torch.stack([_trace_terms(_drop(small, index)).mean() for index in range(count)]).double()
    # The jackknife, which is too large in the mean if anything (Efron and Stein): terms that share sketches agree too
    # well with each other for the spread between them to be trusted.
    error = math.sqrt(float((shorter - shorter.mean()).square().sum()) * (count - 1) / count)
    return ScalarEstimate(value, error, 2 * count, "xtrace")


@dataclass(frozen=True)
class _SmallSketch:
    """All that traces need of a sketch, in the coordinates of its basis.

    ``QᵀAQ``, ``QᵀΩ``, ``(AQ)ᵀΩ``, the numbers ``ω_iᵀAω_i``, and the directions that leave each probe out.
    """

    inner_KK: Tensor
    coordinates_KK: Tensor
    pairings_KK: Tensor
    forms_K: Tensor
    left_out_KK: Tensor


def _restrict(sketch: _Sketch) -> _SmallSketch:
    return _SmallSketch(
        inner_KK=sketch.basis_PK.T @ sketch.basis_images_PK,
        coordinates_KK=sketch.basis_PK.T @ sketch.signs_PK,
        pairings_KK=sketch.basis_images_PK.T @ sketch.signs_PK,
        forms_K=(sketch.signs_PK * sketch.images_PK).sum(0),
        left_out_KK=sketch.left_out_KK,
    )


def _trace_terms(small: _SmallSketch) -> Tensor:
    """Return the estimate of the trace of each probe, the others being its sketch."""
    left_KK, inner_KK = small.left_out_KK, small.inner_KK
    inside_K = inner_KK.trace() - (left_KK * (inner_KK @ left_KK)).sum(0)
    within_KK = small.coordinates_KK - left_KK * (left_KK * small.coordinates_KK).sum(0)
    rest_K = small.forms_K - 2 * (within_KK * small.pairings_KK).sum(0) + (within_KK * (inner_KK @ within_KK)).sum(0)
    return inside_K + rest_K


def _drop(small: _SmallSketch, index: int) -> _SmallSketch:
    """Return the sketch as if one of its probes had not been drawn."""
    others = [other for other in range(len(small.forms_K)) if other != index]
    full_KK, _ = torch.linalg.qr(small.left_out_KK[:, index : index + 1], mode="complete")
    onto_KK = full_KK[:, 1:].T
    left_KK = onto_KK @ small.left_out_KK[:, others]
    return _SmallSketch(
        inner_KK=onto_KK @ small.inner_KK @ onto_KK.T,
        coordinates_KK=onto_KK @ small.coordinates_KK[:, others],
        pairings_KK=onto_KK @ small.pairings_KK[:, others],
        forms_K=small.forms_K[others],
        left_out_KK=left_KK / left_KK.norm(dim=0).clamp(min=torch.finfo(left_KK.dtype).tiny),
    )


def xdiag(operator: Any, *, products: int = 48, generator: torch.Generator | None = None) -> VectorEstimate:
    """Estimate the diagonal as `xtrace` does the trace.

    The estimate is the mean over i of ``diag(P_i A) + ω_i ⊙ (I − P_i) A ω_i``.

    Args:
        operator: anything with ``shape`` and ``@``.
        products: to be spent, at least 4; half for the probes, half for the basis.
        generator: of the draws; torch's default otherwise. Processes of a group need equal ones.

    Returns:
        The estimate ``[P]``, with standard errors by the jackknife, as `xtrace` has.

    Law:
        Unbiased. The standard errors are too large in the mean, up to about twice: terms that share sketches agree too
        well with each other for the spread between them to be trusted. They take ``P products³ / 4`` multiplications.

    Raises:
        BudgetError: if there are fewer than four products, or more than two for each dimension.

    References:
        Epperly, Tropp, Webber, XTrace: making the most of every sample in stochastic trace estimation, SIMAX 2024.
    """
    operator = check_probes(operator, "products", products, minimum=4)
    count = products // 2
    check_within(operator, "products", products, share=2)
    sketch = _draw_sketch(operator, count, generator)
    coordinates_KK = sketch.basis_PK.T @ sketch.images_PK
    whole_KK = torch.eye(count, dtype=coordinates_KK.dtype, device=coordinates_KK.device)
    values_P = _mean_diagonal(sketch, coordinates_KK, whole_KK, sketch.left_out_KK, list(range(count)))
    shorter_KP = torch.stack([_mean_diagonal_without(sketch, coordinates_KK, index) for index in range(count)])
    squares_P = (shorter_KP - shorter_KP.mean(0)).square().sum(0)
    return VectorEstimate(values_P, (squares_P * ((count - 1) / count)).sqrt(), 2 * count, "xdiag")


def _mean_diagonal(
    sketch: _Sketch, coordinates_KK: Tensor, projector_KK: Tensor, left_out_KR: Tensor, kept: list[int]
) -> Tensor:
    """Return the mean over some of the probes of the estimates ``[P]`` that leave each of them out of the sketch.

    Args:
        sketch: with all probes.
        coordinates_KK: ``Qᵀ A Ω``.
        projector_KK: on the part of the basis that the kept probes span.
        left_out_KR: the direction in it that leaves each kept probe out, at unit length.
        kept: indices of the R probes.
    """
    inside_KK = len(kept) * projector_KK - left_out_KR @ left_out_KR.T
    inside_P = ((sketch.basis_PK @ inside_KK) * sketch.basis_images_PK).sum(1)
    along_KR = projector_KK @ coordinates_KK[:, kept]
    along_KR = along_KR - left_out_KR * (left_out_KR * along_KR).sum(0)
    rest_PR = sketch.images_PK[:, kept] - sketch.basis_PK @ along_KR
    return (inside_P + (sketch.signs_PK[:, kept] * rest_PR).sum(1)) / len(kept)


def _mean_diagonal_without(sketch: _Sketch, coordinates_KK: Tensor, index: int) -> Tensor:
    """Return the estimate as if one of the probes had not been drawn."""
    left_KK = sketch.left_out_KK
    gone_K = left_KK[:, index]
    projector_KK = torch.eye(len(gone_K), dtype=gone_K.dtype, device=gone_K.device) - torch.outer(gone_K, gone_K)
    kept = [other for other in range(len(gone_K)) if other != index]
    left_KR = projector_KK @ left_KK[:, kept]
    left_KR = left_KR / left_KR.norm(dim=0).clamp(min=torch.finfo(left_KR.dtype).tiny)
    return _mean_diagonal(sketch, coordinates_KK, projector_KK, left_KR, kept)
