"""PReLU: the branch in one bit per entry, and codes of the negative part for the slope's gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cheapgrad.ops._guards import differentiate_once, refuse_forward_mode
from cheapgrad.ops.linear import may_need_grad
from cheapgrad.sketch import DenseMatrix, LayerShape, Moment, Operands, StochasticRounding, Variance, random
from cheapgrad.sketch.bits import pack_bits, unpack_bits
from cheapgrad.sketch.rounding_covariance import variance_of_sums

_NAME = "activation (prelu)"


def _matrix_sizes(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns: a row is what one channel of one example holds, or the last axis of a matrix."""
    columns = math.prod(shape[2:]) if len(shape) > 2 else shape[-1] if shape else 1
    return math.prod(shape) // max(columns, 1), columns


def _per_channel(weight: Tensor, x: Tensor) -> Tensor:
    """Return the slopes in a shape that goes with `x`, whose channels are its second axis."""
    return weight.view(1, -1, *[1] * (x.dim() - 2)) if x.dim() > 1 else weight


def _sum_per_slope(values: Tensor, weight: Tensor) -> Tensor:
    if weight.numel() == 1:
        return values.sum().view(weight.shape)
    return values.sum([axis for axis in range(values.dim()) if axis != 1]) if values.dim() > 1 else values


class _SketchedPRelu(torch.autograd.Function):
    """Forward is PyTorch's; backward reads the branch, and the decoded negative part for the slopes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, tie: Tensor | None, codec: StochasticRounding, branch: Tensor, *codes: Tensor
    ) -> Tensor:
        return torch.nn.functional.prelu(x, random.anchor(weight, codes))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, tie, ctx.codec, branch, *codes = inputs
        ctx.shape = x.shape
        ctx.save_for_backward(weight, tie, branch, *codes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, tie, packed, *codes = ctx.saved_tensors
        sizes = _matrix_sizes(ctx.shape)
        grad_input = grad_weight = None
        with torch.no_grad():
            is_positive = unpack_bits(packed, 1, sizes[1]).bool().view(ctx.shape)
            if ctx.needs_input_grad[0]:
                grad_input = torch.where(is_positive, grad, grad * _per_channel(weight, grad).to(grad.dtype))
            if ctx.needs_input_grad[1]:
                negative = ctx.codec.restore(tuple(codes), *sizes, grad.dtype).dense().view(ctx.shape)
                products = torch.where(is_positive, 0.0, grad * negative)
                grad_weight = _sum_per_slope(products, weight).to(weight.dtype)
        gradients = [differentiate_once(each, _NAME, grad, tie, weight) for each in (grad_input, grad_weight)]
        return (*gradients, *([None] * (len(ctx.needs_input_grad) - 2)))


class _EagerSketchedPRelu(_SketchedPRelu):
    """The same, refusing forward mode by name; compiled graphs take no Function that defines a jvp."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        refuse_forward_mode(_NAME)


def sketched_prelu(x: Tensor, weight: Tensor, codec: StochasticRounding) -> Tensor:
    """Return ``max(x, 0) + weight * min(x, 0)``, bit for bit as PyTorch does.

    Args:
        x: floating point, at least one axis; channels are the second one.
        weight: slopes, shape ``[C]`` or ``[1]``.
        codec: for ``min(x, 0)``, which the slopes' gradient is linear in.

    **Law** dx exact. Bias of dweight 0, variance in `prelu_variance`. Held: a bit per entry, and the codes where the
    slopes need a gradient.

    Raises:
        SecondDerivativeError: when a gradient through it is differentiated again.
        ForwardModeError: in forward-mode differentiation.
    """
    with torch.no_grad():
        matrix = x.detach().reshape(_matrix_sizes(x.shape))
        packed = pack_bits((matrix > 0).to(torch.uint8), 1)
        codes: tuple[Tensor, ...] = ()
        if may_need_grad(weight):
            codes = codec.store(Operands(Moment.STORED, DenseMatrix(matrix.clamp(max=0))))
    if torch.compiler.is_compiling():
        return _SketchedPRelu.apply(x, weight, None, codec, packed, *codes)
    # No bytes, but a child of x: stands for it where a second derivative is refused, so that x itself is not held.
    return _EagerSketchedPRelu.apply(x, weight, x.reshape(-1)[:0].clone(), codec, packed, *codes)


def prelu_saved_bytes(shape: tuple[int, ...], codec: StochasticRounding, wants_weight: bool) -> float:
    """Return the bytes held for an input of this shape."""
    rows, columns = _matrix_sizes(shape)
    codes = codec.law.saved_bytes(LayerShape(rows, columns, columns), Moment.STORED) if wants_weight else 0.0
    return rows * -(-columns // 8) + codes


def prelu_variance(x: Tensor, weight: Tensor, grad: Tensor, codec: StochasticRounding) -> Variance:
    """Return the expected squared errors of dx (none) and dweight: ``sum_slopes Var(sum grad e)`` over ``x <= 0``."""
    sizes = _matrix_sizes(x.shape)
    slope = _per_channel(torch.arange(weight.numel(), device=x.device), x).expand(x.shape)
    used = torch.where(x > 0, 0.0, grad.double())
    of_slopes = variance_of_sums(
        codec, x.detach().clamp(max=0).reshape(sizes), used.reshape(sizes), slope.reshape(sizes)
    )
    return Variance(torch.zeros_like(of_slopes.sum()), of_slopes.sum())
