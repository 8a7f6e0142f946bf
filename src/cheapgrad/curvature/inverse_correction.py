"""Inverting an unbiased estimate biases it: the first-order correction."""

from __future__ import annotations

import math

from torch import Tensor

from cheapgrad.errors import BatchError, ShapeError, SingularCurvatureError, check_instance


def correct_inverse(estimate: Tensor, variance: Tensor) -> Tensor:
    """Return an estimate of ``1 / c`` from an unbiased one of c, with the bias of inverting removed to first order.

    ``E[1 / ĉ] ≈ 1/c + Var(ĉ)/c³``, too large by Jensen's inequality. The correction ``1/ĉ - Var/ĉ³`` is written as

        ĉ / (ĉ² + Var)

    which agrees with it to first order in ``Var / ĉ²`` and stays bounded where the estimate is near zero.

    Args:
        estimate: ĉ, any shape, of any sign.
        variance: of the estimates, same shape, at least 0.

    Returns:
        A tensor of that shape.

    Law:
        Bias ``O(Var² / c⁵)`` for symmetric noise, against ``Var / c³`` without the correction. Shrinks towards zero
        where the noise exceeds the value. Cost: three operations an entry.

    Raises:
        ShapeError: if estimates and variances have different shapes.
        BatchError: if a variance is not known (NaN) or negative.
        SingularCurvatureError: if an estimate is zero, and its variance as well.

    Example:
        >>> import torch
        >>> (
        ...     correct_inverse(torch.tensor([2.0]), torch.tensor([0.0])),
        ...     correct_inverse(torch.tensor([2.0]), torch.tensor([0.4])),
        ... )
        (tensor([0.5000]), tensor([0.4545]))

    References:
        The correction ``-Var / c³`` is used on preconditioners in arXiv:2605.20756; the bounded form is ours.
    """
    for name, value in (("estimate", estimate), ("variance", variance)):
        check_instance(name, value, Tensor, f"use torch.as_tensor({name})")
    if estimate.shape != variance.shape:
        raise ShapeError(
            f"each estimate has a variance, but got the shapes {tuple(estimate.shape)} and {tuple(variance.shape)}"
        )
    unknown = int((~(variance >= 0)).sum())
    if unknown:
        worst = float(variance[~(variance >= 0)].flatten()[0])
        raise BatchError(
            f"{unknown} of {variance.numel()} variances are {'not known' if math.isnan(worst) else worst}, and the "
            "bias of an inverse depends on them; give batch b at least two micro-batches"
        )
    squares = estimate.square() + variance
    if bool((squares == 0).any()):
        raise SingularCurvatureError(
            f"{int((squares == 0).sum())} of {estimate.numel()} estimates are 0 without any uncertainty, and have no "
            "inverse; add a positive damping to the curvature first"
        )
    return estimate / squares
