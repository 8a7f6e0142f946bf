"""Activations whose backward pass stores a branch in one bit, or a slope in a few, in place of the input."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cheapgrad.ops._guards import differentiate_once, refuse_forward_mode
from cheapgrad.ops.activation import Activation
from cheapgrad.ops.linear import may_need_grad
from cheapgrad.ops.stored_derivative import StoredDerivative, apply_derivative, store_derivative
from cheapgrad.sketch import AbstractStrategy, random
from cheapgrad.sketch.transforms import is_inside_transform


def _compute(
    x: Tensor, activation: Activation, strategy: AbstractStrategy | None, features: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the output and what is kept."""
    y = activation.forward(x)
    kept = store_derivative(x, y, activation, strategy, features).tensors
    if torch.compiler.is_compiling():
        # A factor of one that formally depends on what was drawn, or the draw may be repeated in backward.
        y = y * random.anchor(torch.ones((), dtype=y.dtype, device=y.device), kept)
    return y, kept


class _SketchedActivation(torch.autograd.Function):
    """Forward is PyTorch's; it returns what it keeps beside the output, so that the output is computed once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, tie: Tensor | None, activation: Activation, strategy: AbstractStrategy | None, features: int
    ) -> tuple[Tensor, ...]:
        y, kept = _compute(x, activation, strategy, features)
        return y, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, tie, activation, strategy, features = inputs
        kept = output[1:]
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(tie, *kept)
        bits = 1 if activation.slope_kind == "piecewise linear" else strategy.bits
        fused = strategy is not None and strategy.fused
        ctx.stored = StoredDerivative(activation, bits, x.numel() // features, features, (), fused)
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *ignored: Tensor | None) -> tuple[Tensor | None, ...]:
        tie, *kept = ctx.saved_tensors
        result = apply_derivative(ctx.stored.holding(tuple(kept)), grad).to(ctx.dtype)
        result = differentiate_once(result, f"activation ({ctx.stored.activation.name})", grad, tie)
        return result, None, None, None, None


class _EagerSketchedActivation(_SketchedActivation):
    """The same, refusing forward mode by name; compiled graphs take no Function that defines a jvp."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        refuse_forward_mode("activation")


def features_of(shape: tuple[int, ...]) -> int:
    """Return how many entries make a row: the last axis, or what one channel holds of an image."""
    # Images lie with their pixels innermost.
    return math.prod(shape[2:]) if len(shape) > 3 else shape[-1] if shape else 1


class _OverwritingActivation(_SketchedActivation):
    """The same, writing the output over the input, as modules with ``inplace=True`` do."""

    generate_vmap_rule = False

    @staticmethod
    def forward(
        x: Tensor, tie: Tensor | None, activation: Activation, strategy: AbstractStrategy | None, features: int
    ) -> tuple[Tensor, ...]:
        y, kept = _compute(x, activation, strategy, features)
        return x.copy_(y), *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_dirty(inputs[0])
        _SketchedActivation.setup_context(ctx, inputs, output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        refuse_forward_mode("activation")


def may_be_overwritten(x: Tensor) -> bool:
    """Tell whether `overwriting_activation` can write over a tensor: an eager one that is neither a view nor a leaf."""
    return (
        not torch.compiler.is_dynamo_compiling()
        and not is_inside_transform()
        and x.requires_grad
        and not x.is_leaf
        and not x._is_view()
    )


def overwriting_activation(x: Tensor, activation: Activation, strategy: AbstractStrategy) -> Tensor:
    """Write ``f(x)`` over `x` and return it, holding for backward what `sketched_activation` holds.

    Args:
        x: the input; see `may_be_overwritten`.
        activation: which one.
        strategy: as for `store_derivative`.
    """
    tie = x.reshape(-1)[:0].clone()
    return _OverwritingActivation.apply(x, tie, activation, strategy, features_of(tuple(x.shape)))[0]


def sketched_activation(x: Tensor, activation: Activation, strategy: AbstractStrategy | None) -> Tensor:
    """Return ``f(x)`` bit for bit as PyTorch does, holding a branch or a rounded slope per entry for backward.

    Args:
        x: the input, any shape, floating point.
        activation: which one.
        strategy: as for `store_derivative`. Without one, a smooth activation is PyTorch's own.

    Returns:
        In the shape of `x`.

    **Law** Piecewise linear: exact. Smooth: bias 0, variance of ``dx`` ``sum (grad * step)**2 f (1 - f)``; nothing is
    used twice, so errors of successive layers stay independent. Held: ``bits / 8`` bytes per entry.

    Raises:
        PlacementError: for a strategy other than `StochasticRounding`.
        SecondDerivativeError: when a gradient through it is differentiated again.
        ForwardModeError: in forward-mode differentiation.
    """
    is_exact = strategy is None and activation.slope_kind == "smooth"
    if is_exact or x.numel() == 0 or not may_need_grad(x):
        return activation.forward(x)
    features = features_of(x.shape)
    if torch.compiler.is_compiling():
        return _SketchedActivation.apply(x, None, activation, strategy, features)[0]
    # No bytes, but a child of x: stands for it where a second derivative is refused, so that x itself is not held.
    tie = x.reshape(-1)[:0].clone()
    return _EagerSketchedActivation.apply(x, tie, activation, strategy, features)[0]
