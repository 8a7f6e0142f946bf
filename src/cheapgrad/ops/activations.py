"""Activations whose backward pass stores a branch in one bit, or a slope in a few, in place of the input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cheapgrad.errors import PlacementError, UnknownNameError, nearest_match
from cheapgrad.ops._activation_table import PIECEWISE_LINEAR, SMOOTH, PiecewiseLinear, Smooth
from cheapgrad.ops._guards import differentiate_once, refuse_forward_mode
from cheapgrad.ops.linear import may_need_grad
from cheapgrad.sketch import AbstractStrategy, StochasticRounding, random
from cheapgrad.sketch.bits import pack_bits, unpack_bits, unpack_flags
from cheapgrad.sketch.fixed_range import FixedRange, Grid
from cheapgrad.sketch.fusing import work_by_rows
from cheapgrad.sketch.transforms import is_inside_transform


@dataclass(frozen=True)
class Activation:
    """An element-wise function ``y = f(x)``, by name.

    Args:
        name: one of `activation_names()`.
        options: further arguments as pairs, such as ``(("approximate", "tanh"),)``; those left out have PyTorch's
            defaults.

    Raises:
        UnknownNameError: if the name, or an option, is not known.

    >>> Activation("leaky_relu").slope_kind
    'piecewise linear'
    >>> float(Activation("gelu").derivative(torch.zeros(1), torch.zeros(1)))
    0.5
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def from_options(cls, numbers: Sequence[float], name: str, options: Sequence[tuple[str, Any]]) -> Activation:
        """Return the activation that `numbers` and `texts` describe."""
        left = iter(numbers)
        return cls(name, tuple((option, next(left) if value is None else value) for option, value in options))

    def texts(self) -> tuple[Any, ...]:
        """Return name and options as plain data, with None for every number."""
        return self.name, tuple((option, value if isinstance(value, str) else None) for option, value in self.options)

    def numbers(self) -> tuple[float, ...]:
        """Return the options that are numbers, which compiled graphs may hold as symbols."""
        return tuple(value for _, value in self.options if not isinstance(value, str))

    def __post_init__(self) -> None:
        names = activation_names()
        if self.name not in names:
            raise UnknownNameError(
                f"unknown activation {self.name!r}{nearest_match(self.name, names)} (known: {', '.join(names)})"
            )
        defaults = self._entry.defaults or {}
        for option, _ in self.options:
            if option not in defaults:
                raise UnknownNameError(
                    f"{self.name} has no option {option!r}{nearest_match(option, defaults)} "
                    f"(options: {', '.join(defaults) or 'none'})"
                )

    @property
    def _entry(self) -> Smooth | PiecewiseLinear:
        return SMOOTH[self.name] if self.name in SMOOTH else PIECEWISE_LINEAR[self.name]

    @property
    def _arguments(self) -> dict[str, Any]:
        return {**(self._entry.defaults or {}), **dict(self.options)}

    @property
    def slope_kind(self) -> str:
        """``"smooth"`` or ``"piecewise linear"``."""
        return "smooth" if self.name in SMOOTH else "piecewise linear"

    @property
    def reads_output(self) -> bool:
        """Whether the slope is computed from the output instead of the input."""
        return self.name in SMOOTH and SMOOTH[self.name].reads_output

    def forward(self, x: Tensor) -> Tensor:
        """Return ``f(x)``, bit for bit as PyTorch does."""
        return self._entry.forward(x, self._arguments)

    def derivative(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``f'(x)``, bit for bit what PyTorch's backward pass multiplies a cotangent by.

        Args:
            x: the input.
            y: the output.
        """
        return self.backward(_ones_like(x), x, y)

    def backward(self, grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return ``grad * f'(x)`` by PyTorch's own kernel."""
        entry = self._entry
        if isinstance(entry, Smooth):
            return entry.backward(grad, y if entry.reads_output else x, self._arguments)
        return entry.backward(grad, self.branch(x), self._arguments)

    def branch(self, x: Tensor) -> Tensor:
        """Return 1.0 or 0.0 per entry: which of its two slopes a piecewise linear activation has there."""
        return PIECEWISE_LINEAR[self.name].branch(_ones_like(x), x, self._arguments)

    def pull_back_branch(self, grad: Tensor, branch: Tensor) -> Tensor:
        """Return ``grad * f'(x)`` given what `branch` returned."""
        return PIECEWISE_LINEAR[self.name].backward(grad, branch, self._arguments)

    def codec(self, bits: int) -> FixedRange:
        """Return the codec for the slope of a smooth activation."""
        return FixedRange(Grid.covering(*SMOOTH[self.name].interval(self._arguments), bits))


def activation_names() -> tuple[str, ...]:
    """Return the names of all activations that are covered.

    >>> "gelu" in activation_names()
    True
    """
    return tuple(sorted({**SMOOTH, **PIECEWISE_LINEAR}))


@dataclass(frozen=True)
class StoredDerivative:
    """What is kept of an activation for its backward pass.

    Attributes:
        activation: the activation.
        bits: bits per slope; 1 for a branch; None where a whole tensor is kept.
        rows: N.
        features: I.
        tensors: the plain tensors to save.
        fused: whether passes over the entries are compiled.
    """

    activation: Activation
    bits: int | None
    rows: int
    features: int
    tensors: tuple[Tensor, ...]
    fused: bool = False

    def holding(self, tensors: tuple[Tensor, ...]) -> StoredDerivative:
        """Return the same with other tensors, as autograd hands them back."""
        return replace(self, tensors=tensors)


def store_derivative(
    x: Tensor, y: Tensor, activation: Activation, strategy: AbstractStrategy | None, features: int | None = None
) -> StoredDerivative:
    """Keep what the backward pass of an activation needs.

    A piecewise linear activation keeps its branch in one bit per entry, whatever the strategy: the gradient is exact. A
    smooth one keeps its slope in ``strategy.bits`` bits, rounded up or down at random within the known interval of its
    slopes: the backward pass is linear in the slope, so the gradient is unbiased. Without a strategy the input is kept
    (the output where the slope is a function of it), as PyTorch does.

    Args:
        x: the input, floating point.
        y: the output.
        activation: which one.
        strategy: `StochasticRounding`, or None. Its groups are not used: the interval is known.
        features: entries of a row, for drawing and for `apply_derivative` on rows; the last axis if left out.

    Raises:
        PlacementError: if the strategy is another one.
    """
    columns = features if features is not None else x.shape[-1] if x.dim() else 1
    rows = x.numel() // max(columns, 1)
    if strategy is not None and not isinstance(strategy, StochasticRounding):
        raise PlacementError(
            f"{strategy!r} cannot store the slope of {activation.name}: only StochasticRounding(bits) can; sample rows "
            "in the layers around it"
        )
    fused = strategy is not None and strategy.fused
    with torch.no_grad():
        x_NI, y_NI = (tensor.detach().reshape(rows, columns) for tensor in (x, y))
        if activation.slope_kind == "piecewise linear":
            packed = work_by_rows(_pack_branch, (x_NI,), fused=fused, activation=activation)
            return StoredDerivative(activation, 1, rows, columns, packed, fused)
        if strategy is None:
            return StoredDerivative(activation, None, rows, columns, (y if activation.reads_output else x,))
        codec, source_NI = activation.codec(strategy.bits), y_NI if activation.reads_output else x_NI
        dither = codec.draw(x_NI, rows, columns)
        tensors = work_by_rows(
            _encode_slope,
            (codec.blocks(source_NI), dither.draws),
            (dither.shifts,),
            fused=fused,
            activation=activation,
            bits=strategy.bits,
        )
    return StoredDerivative(activation, strategy.bits, rows, columns, tensors, fused)


def apply_derivative(stored: StoredDerivative, grad: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return the cotangent of the input: ``grad * f'(x)``, or its unbiased stand-in.

    Args:
        stored: what `store_derivative` returned.
        grad: cotangent of the output; any shape with all entries, or ``[K, I]`` with `rows`.
        rows: indices of the rows that `grad` belongs to, or None for all; only those are decoded.

    Returns:
        In the shape of `grad`.
    """
    with torch.no_grad():
        grad_KI = grad.reshape(-1, stored.features)
        kept = tuple(tensor.reshape(stored.rows, -1) for tensor in stored.tensors)
        if rows is not None:
            kept = tuple(tensor.index_select(0, rows) for tensor in kept)

        if stored.bits is None:
            return stored.activation.backward(grad_KI, kept[0], kept[0]).view(grad.shape)
        pull_back = _pull_back_branch if stored.bits == 1 else _pull_back_slope
        options: dict[str, Any] = {"activation": stored.activation}
        if stored.bits > 1:
            options["bits"] = stored.bits
        return work_by_rows(pull_back, (grad_KI, *kept), fused=stored.fused, **options)[0].view(grad.shape)


def _encode_slope(
    source: Tensor, draws: Tensor, shifts: Tensor, *, activation: Activation, bits: int
) -> tuple[Tensor, ...]:
    """Return codes of ``f'(x)``, given x or, where the slope is read from it, the output in blocks."""
    wide = _wide(source)
    return activation.codec(bits).encode(activation.derivative(wide, wide), draws, shifts)


def _pull_back_slope(
    grad_KI: Tensor, packed: Tensor, flags: Tensor, *, activation: Activation, bits: int
) -> tuple[Tensor]:
    codec = activation.codec(bits)
    slope = codec.decode(packed, flags, grad_KI.shape[1], grad_KI.dtype)
    return (torch.mul(slope, codec.blocks(grad_KI)).to(grad_KI.dtype).reshape(grad_KI.shape),)


def _pack_branch(x_NI: Tensor, *, activation: Activation) -> tuple[Tensor]:
    # By way of signed bytes: conversion to them is done many at a time.
    return (pack_bits(activation.branch(x_NI).to(torch.int8).view(torch.uint8), 1),)


def _pull_back_branch(grad_KI: Tensor, packed: Tensor, *, activation: Activation) -> tuple[Tensor]:
    features = grad_KI.shape[1]
    if features % 8:
        return (activation.pull_back_branch(grad_KI, unpack_bits(packed, 1, features).to(grad_KI.dtype)),)
    branch = unpack_flags(packed, features).to(grad_KI.dtype)
    return (activation.pull_back_branch(grad_KI.view(branch.shape), branch).reshape(grad_KI.shape),)


def _ones_like(x: Tensor) -> Tensor:
    return torch.ones((), dtype=x.dtype, device=x.device).expand(x.shape)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _SketchedActivation(torch.autograd.Function):
    """Forward is PyTorch's; it returns what it keeps beside the output, so that the output is computed once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, tie: Tensor | None, activation: Activation, strategy: AbstractStrategy | None, features: int
    ) -> tuple[Tensor, ...]:
        y = activation.forward(x)
        kept = store_derivative(x, y, activation, strategy, features).tensors
        if torch.compiler.is_compiling():
            # A factor of one that formally depends on what was drawn, or the draw may be repeated in backward.
            y = y * random.anchor(torch.ones((), dtype=y.dtype, device=y.device), kept)
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


def derivative_saved_bytes(activation: Activation, strategy: StochasticRounding, rows: int, features: int) -> int:
    """Return the bytes that `store_derivative` keeps.

    >>> derivative_saved_bytes(Activation("relu"), StochasticRounding(4), rows=2, features=16)
    4
    >>> derivative_saved_bytes(Activation("gelu"), StochasticRounding(4), rows=2, features=16)
    20
    """
    if activation.slope_kind == "piecewise linear":
        return rows * -(-features // 8)
    # Every row has a flag of two bytes, which shows a NaN.
    return rows * (-(-features * strategy.bits // 8) + 2)


class _OverwritingActivation(_SketchedActivation):
    """The same, writing the output over the input, as modules with ``inplace=True`` do."""

    generate_vmap_rule = False

    @staticmethod
    def forward(
        x: Tensor, tie: Tensor | None, activation: Activation, strategy: AbstractStrategy | None, features: int
    ) -> tuple[Tensor, ...]:
        y = activation.forward(x)
        kept = store_derivative(x, y, activation, strategy, features).tensors
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
