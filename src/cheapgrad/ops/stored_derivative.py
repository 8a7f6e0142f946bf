"""What an activation keeps for its backward pass: a branch in one bit, or a slope in a few."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cheapgrad.errors import PlacementError
from cheapgrad.ops.activation import Activation
from cheapgrad.sketch import AbstractStrategy, StochasticRounding
from cheapgrad.sketch.bits import pack_bits, unpack_bits, unpack_flags
from cheapgrad.sketch.fusing import work_by_rows


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


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


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
