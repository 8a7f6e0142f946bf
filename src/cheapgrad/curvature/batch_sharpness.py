"""Curvature along a batch's own gradient: the coupled quantity on purpose, and the decoupled one beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.curvature.operators import as_operator
from cheapgrad.errors import BatchError, NonFiniteCurvatureError, ShapeError


@dataclass(frozen=True)
class Sharpness:
    """Mean curvature along normalised mini-batch gradients.

    Attributes:
        coupled: ``E[g_Bᵀ H_B g_B / ‖g_B‖²]``, gradient and curvature from the same mini-batch ("batch sharpness").
        coupled_standard_error: over mini-batches.
        decoupled: ``E[g_Aᵀ H_B g_A / ‖g_A‖²]``, with different mini-batches A and B.
        decoupled_standard_error: over the mini-batches that give the gradient; approximate, as pairs share batches.
        batches: how many there were.
    """

    coupled: float
    coupled_standard_error: float
    decoupled: float
    decoupled_standard_error: float
    batches: int


def measure_batch_sharpness(operator: Any, gradients_BP: Tensor) -> Sharpness:
    """Return the curvature along mini-batch gradients, on the same mini-batch and on the others.

    The coupled quantity is what a step of stochastic gradient descent meets, and what settles near 2 / learning rate
    at the edge of stochastic stability: there the coupling is the point. The decoupled one is the curvature of all data
    along the same directions. Neither may stand for the other.

    Args:
        operator: its micro-batches are the mini-batches.
        gradients_BP: one row for each of them, none of them zero.

    Returns:
        Both means, with standard errors.

    Law:
        Both are unbiased for what they name, over equally weighted mini-batches that are independent. Cost: one product
        with each mini-batch for the coupled, B - 1 for the decoupled mean.

    Raises:
        BatchError: if there are fewer than two mini-batches.
        ShapeError: if there is not one gradient for each.
        NonFiniteCurvatureError: if a gradient is zero or not finite.

    Example:
        >>> from cheapgrad.curvature import DenseOperator, MeanOperator
        >>> operator = MeanOperator(
        ...     [DenseOperator(torch.diag(torch.tensor(each))) for each in ([3.0, 1.0], [1.0, 3.0])]
        ... )
        >>> sharpness = measure_batch_sharpness(operator, torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        >>> sharpness.coupled, sharpness.decoupled
        (3.0, 1.0)

    References:
        Batch sharpness: arXiv:2412.20553. The decoupled counterpart is ours.
    """
    parts = as_operator(operator).micro_batches
    if len(parts) < 2:
        raise BatchError(
            "batch sharpness is a mean over at least 2 mini-batches, but the operator has 1 micro-batch; build it on "
            "several batches"
        )
    if gradients_BP.shape != (len(parts), parts[0].operator.shape[0]):
        raise ShapeError(
            f"gradients must have the shape {(len(parts), parts[0].operator.shape[0])}, one row for each micro-batch, "
            f"but got {tuple(gradients_BP.shape)}"
        )
    norms_B = gradients_BP.norm(dim=1, keepdim=True)
    bad = ~(torch.isfinite(norms_B) & (norms_B > 0))
    if bad.any():
        raise NonFiniteCurvatureError(
            f"the gradient of micro-batch {int(bad.flatten().nonzero()[0])} is zero or not finite"
        )
    directions_PB = (gradients_BP / norms_B).T
    # Row: the mini-batch of the curvature; column: that of the gradient.
    curvature_BB = torch.stack([(directions_PB * (part.operator @ directions_PB)).sum(0) for part in parts])
    curvature_BB = curvature_BB.double().cpu()
    coupled = curvature_BB.diagonal()
    others = (curvature_BB.sum(0) - coupled) / (len(parts) - 1)
    return Sharpness(
        coupled=float(coupled.mean()),
        coupled_standard_error=float(coupled.std()) / math.sqrt(len(parts)),
        decoupled=float(others.mean()),
        decoupled_standard_error=float(others.std()) / math.sqrt(len(parts)),
        batches=len(parts),
    )
