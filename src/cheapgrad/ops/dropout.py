"""Dropout that holds its mask in one bit per entry."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.ops._guards import differentiate_once, refuse_forward_mode
from cheapgrad.sketch.bits import pack_bits, unpack_bits, unpack_flags
from cheapgrad.sketch.fusing import work_by_rows

_NAME = "dropout"
# Less this, the lowest value of SELU, is what PyTorch's alpha dropout puts in the place of dropped entries.
_ALPHA = 1.7580993408473766


@dataclass(frozen=True)
class Dropping:
    """``y = x * mask / (1 - p)``, or for alpha dropout the affine map that keeps mean and variance.

    Attributes:
        p: the chance of an entry to be dropped, above 0 and below 1.
        is_alpha: whether dropped entries are replaced as `torch.nn.AlphaDropout` does.
        fused: whether packing the mask and the backward pass are compiled; the forward pass never is.
    """

    p: float
    is_alpha: bool = False
    fused: bool = False

    def draw(self, x: Tensor) -> Tensor:
        """Draw a mask from PyTorch's stream of random numbers, exactly as PyTorch does.

        Args:
            x: the input, at least one axis.

        Returns:
            The mask in bits, packed along the last axis, shape ``[..., ceil(I / 8)]``.
        """
        with torch.no_grad():
            if _is_fused(x) and not self.is_alpha:
                kept = torch.native_dropout(x.detach(), self.p, True)[1]
            else:
                kept = torch.empty_like(x, requires_grad=False).bernoulli_(1 - self.p)
            packed = work_by_rows(_pack_mask, (kept.reshape(-1, x.shape[-1]),), fused=self.fused)[0]
            return packed.view(*x.shape[:-1], packed.shape[-1])

    def forward(self, x: Tensor, packed: Tensor) -> Tensor:
        """Return the output, bit for bit as PyTorch does."""
        if not self.is_alpha:
            return self._scale(x, packed, fused=False)
        kept = unpack_bits(packed, 1, x.shape[-1]).to(x.dtype)
        factor = 1 / math.sqrt((_ALPHA * _ALPHA * self.p + 1) * (1 - self.p))
        shift = kept.add(-1).mul_(_ALPHA * factor).add_(_ALPHA * factor * self.p)
        return x * kept.mul_(factor) + shift

    def scale(self, grad: Tensor, packed: Tensor) -> Tensor:
        """Return the cotangent of the input, bit for bit as PyTorch does."""
        return self._scale(grad, packed, fused=self.fused)

    def _scale(self, grad: Tensor, packed: Tensor, *, fused: bool) -> Tensor:
        if not self.is_alpha and not _is_fused(grad):
            rows = grad.reshape(-1, grad.shape[-1]), packed.reshape(-1, packed.shape[-1])
            # Rounded as PyTorch rounds its mask; a tensor, so that nothing is compiled anew for another chance.
            factor = torch.ones((), dtype=grad.dtype, device=grad.device).div_(1 - self.p)
            return work_by_rows(_scale_kept, rows, (factor,), fused=fused)[0].reshape(grad.shape)
        kept = unpack_bits(packed, 1, grad.shape[-1])
        if self.is_alpha:
            return grad * kept.to(grad.dtype).mul_(1 / math.sqrt((_ALPHA * _ALPHA * self.p + 1) * (1 - self.p)))
        return torch.ops.aten.native_dropout_backward(grad, kept.bool(), 1 / (1 - self.p))


def _pack_mask(kept: Tensor) -> tuple[Tensor]:
    # By way of signed bytes: conversion to them is done many at a time.
    return (pack_bits(kept.to(torch.int8).view(torch.uint8), 1),)


def _scale_kept(x: Tensor, packed: Tensor, factor: Tensor) -> tuple[Tensor]:
    features = x.shape[1]
    if features % 8:
        return (x * unpack_bits(packed, 1, features).to(x.dtype).mul_(factor),)
    kept = unpack_flags(packed, features).to(x.dtype).mul_(factor)
    return ((x.view(kept.shape) * kept).reshape(x.shape),)


def _is_fused(x: Tensor) -> bool:
    """Tell whether PyTorch drops in one kernel, with a stream and a rounding of its own."""
    return torch.compiler.is_compiling() or x.device.type in ("cuda", "xpu")


class _SketchedDropout(torch.autograd.Function):
    """Multiplies by the mask, twice."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, tie: Tensor | None, packed: Tensor, dropping: Dropping) -> Tensor:
        return dropping.forward(x, packed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, tie, packed, ctx.dropping = inputs
        ctx.save_for_backward(tie, packed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tie, packed = ctx.saved_tensors
        with torch.no_grad():
            result = ctx.dropping.scale(grad, packed)
        return differentiate_once(result, _NAME, grad, tie), None, None, None


class _EagerSketchedDropout(_SketchedDropout):
    """The same, refusing forward mode by name; compiled graphs take no Function that defines a jvp."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        refuse_forward_mode(_NAME)


def sketched_dropout(x: Tensor, dropping: Dropping, packed: Tensor) -> Tensor:
    """Return `x` with entries dropped, bit for bit as PyTorch does, holding a bit per entry for backward.

    Args:
        x: the input, floating point, at least one axis.
        dropping: the chance, and the kind.
        packed: what ``dropping.draw(x)`` returned.

    **Law** The gradient is exact. Held: ``ceil(I / 8)`` bytes for each of the last axis's runs of I entries.

    Raises:
        SecondDerivativeError: when a gradient through it is differentiated again.
        ForwardModeError: in forward-mode differentiation.

    >>> torch.manual_seed(0) and None
    >>> x, dropping = torch.ones(2, 16), Dropping(0.5)
    >>> packed = dropping.draw(x)
    >>> packed.shape, bool((sketched_dropout(x, dropping, packed) == dropping.scale(x, packed)).all())
    (torch.Size([2, 2]), True)
    """
    if torch.compiler.is_compiling():
        return _SketchedDropout.apply(x, None, packed, dropping)
    # No bytes, but a child of x: stands for it where a second derivative is refused, so that x itself is not held.
    return _EagerSketchedDropout.apply(x, x.reshape(-1)[:0].clone(), packed, dropping)
