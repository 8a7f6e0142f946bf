"""The cheap alternative to a second batch: eigenvalues of one batch, shrunk non-linearly."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cheapgrad.errors import NonFiniteCurvatureError, ShapeError, check_count, check_instance

# Eigenvalues below this share of the largest are rounding.
_ROUNDING = 1e-12


def shrink_eigenvalues(eigenvalues: Tensor, examples: int) -> Tensor:
    """Estimate the curvature of all data along a batch's own eigenvectors, from the batch's spectrum alone.

    For a batch curvature that is a sample covariance, ``H_B = XᵀX / B``, the spectrum says how much each direction owes
    to chance. With ``m(x)`` the transform of the spectrum of the companion matrix ``XXᵀ / B`` (the same eigenvalues
    λ_j, filled up with B - P zeros if B > P), smoothed by a kernel,

        ûᵢᵀ H ûᵢ ≈ 1 / (λᵢ |m(λᵢ)|²),      m(x) = (1/B) Σ_j kernel transform of 1 / (λ_j - x)

    Args:
        eigenvalues: all P of the batch's curvature, zeros included, ``[P]``, in any order.
        examples: B, the number of independent rows of X.

    Returns:
        The estimates ``[P]``, in the order given. Directions of eigenvalue zero share one value.

    Law:
        For rows of the form ``Σ^(1/2) z`` with independent entries, converges to ``ûᵢᵀ H ûᵢ`` as P and B grow together;
        at an isolated top eigenvalue too. It needs the whole spectrum and the structure of a covariance: for a
        Gauss-Newton matrix of a network, whose rows are far from that, it is a heuristic, and it has no
        standard error. Not for Hessians, whose noise is additive. Cost: P² operations after the eigenvalues.

    Raises:
        ShapeError: if the eigenvalues are not a vector, or more are positive than there are rows.
        NonFiniteCurvatureError: if one is not finite, or negative beyond rounding.
        BudgetError: if `examples` is no whole number of at least 2.

    Example:
        >>> rows = torch.randn(200, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> batch = torch.linalg.eigvalsh(rows.T @ rows / 200)  # the curvature of all data is 1
        >>> shrunk = shrink_eigenvalues(batch, 200)
        >>> round(float(batch.max()), 1), bool((shrunk - 1).square().mean() < 0.03)
        (2.9, True)

    References:
        Ledoit and Wolf, "Analytical nonlinear shrinkage of large-dimensional covariance matrices" (2020): kernel and
        bandwidth; the optimal value is Ledoit and Péché's (2011). Written here for the companion matrix, so that one
        formula covers more parameters than examples as well.
    """
    check_count("examples", examples, minimum=2)
    values_P = _check_spectrum(eigenvalues)
    positive = values_P > _ROUNDING * values_P.max()
    if int(positive.sum()) > examples:
        raise ShapeError(
            f"a covariance of {examples} rows has at most {examples} positive eigenvalues, but "
            f"{int(positive.sum())} came; count independent rows: up to C times as many for C outputs an example"
        )
    kept_K = values_P[positive]
    bandwidth = examples ** (-1 / 3)
    real_K, imaginary_K = _kernel_transform(kept_K, bandwidth)
    # The zeros of the companion matrix, where it has more rows than the batch has positive eigenvalues.
    zeros = (examples - len(kept_K)) / examples
    share = len(kept_K) / examples
    real_K, imaginary_K = share * real_K - zeros / kept_K, share * imaginary_K
    shrunk_P = torch.empty_like(values_P)
    shrunk_P[positive] = 1 / (kept_K * (real_K.square() + imaginary_K.square()))
    nulls = int((~positive).sum())
    if nulls:
        shrunk_P[~positive] = _null_value(kept_K, examples, nulls, bandwidth)
    return shrunk_P.to(eigenvalues.dtype)


def _check_spectrum(eigenvalues: Tensor) -> Tensor:
    check_instance("eigenvalues", eigenvalues, Tensor, "use torch.as_tensor(eigenvalues)")
    if eigenvalues.ndim != 1 or len(eigenvalues) == 0:
        raise ShapeError(f"eigenvalues must be a vector with all of them, but got the shape {tuple(eigenvalues.shape)}")
    values_P = eigenvalues.double()
    largest = float(values_P.max())
    lowest_allowed = -1e-6 * max(largest, 0.0)
    if not torch.isfinite(values_P).all() or float(values_P.min()) < lowest_allowed or largest <= 0:
        raise NonFiniteCurvatureError(
            f"shrinkage is for covariances, with eigenvalues of at least 0, not all 0, but got some from "
            f"{float(values_P.min()):.3g} to {largest:.3g}; a Hessian needs a second batch: split_sample"
        )
    return values_P.clamp(min=0)


def _kernel_transform(values_K: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """Return ``(1/K) Σ_j 1 / (λ_j - x - i0)`` at every eigenvalue, smoothed by Epanechnikov kernels of width ~ λ_j."""
    widths_K = bandwidth * values_K
    scaled_KK = (values_K.unsqueeze(1) - values_K) / widths_K
    root = math.sqrt(5.0)
    inside_KK = (1 - scaled_KK.square() / 5).clamp(min=0)
    density_K = (3 / (4 * root) * inside_KK / widths_K).mean(1)
    # The principal-value transform of the kernel; at ±√5 the logarithm diverges and its factor vanishes.
    ratio_KK = ((root - scaled_KK) / (root + scaled_KK)).abs()
    log_KK = torch.where((ratio_KK > 0) & torch.isfinite(ratio_KK), ratio_KK, torch.ones_like(ratio_KK)).log()
    hilbert_KK = -3 * scaled_KK / 10 + 3 / (4 * root) * (1 - scaled_KK.square() / 5) * log_KK
    return (hilbert_KK / widths_K).mean(1), math.pi * density_K


def _null_value(kept_K: Tensor, examples: int, nulls: int, bandwidth: float) -> float:
    """Return the curvature along the batch's null space, ``1 / ((P/B - 1) m(0))`` if its dimension is P - B.

    Far below all eigenvalues the smoothed 1 / λ_j is the kernel's transform at distance 1 / bandwidth.
    """
    distance = 1 / (bandwidth * math.sqrt(5.0))
    if distance <= 1:
        # So few examples that the kernels reach zero: the plain mean instead.
        smoothed = 1.0
    else:
        # ∫ k(u) / (1 + h u) du for Epanechnikov's kernel of half width √5.
        width = 1 / distance
        smoothed = 3 / (2 * width**2) * (1 + (width**2 - 1) / (2 * width) * math.log((1 + width) / (1 - width)))
    mean_inverse = float((smoothed / kept_K).mean()) * len(kept_K) / examples
    return 1 / (nulls / examples * mean_inverse)
