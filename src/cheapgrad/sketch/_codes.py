"""Codes of groups of entries as pure functions of tensors: what `fusing` runs."""

from __future__ import annotations

import torch
from torch import Tensor

from cheapgrad.sketch.bits import pack_bits, unpack_bits

# The largest position stays this far below the last code, so that no rounding makes a dither pass beyond it: with b
# bits it is at most (2**b - 1) (1 - 2**-20) by the step's rounding upwards, and each of the difference, the quotient
# and the sum that follow is off by a relative 2**-23 at most, whatever a compiler contracts.
_MARGIN = 1 + 2.0**-20


def encode_groups(groups: Tensor, draws: Tensor, shifts: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """Return packed codes and scales of groups.

    Args:
        groups: ``[n, group]``.
        draws: as in `Dither`.
        shifts: as in `Dither`.
        bits: bits per code.

    Returns:
        uint8 ``[n, group * bits / 8]``, and lowest value and step in bfloat16, ``[n, 2]``.
    """
    low, span = _interval(groups)
    return _encode(groups, low, span, draws, shifts, bits)


def encode_groups_twice(
    groups: Tensor, draws: Tensor, second_draws: Tensor, shifts: Tensor, *, bits: int, second_bits: int
) -> tuple[Tensor, ...]:
    """Return two codes of groups, each as `encode_groups` does."""
    low, span = _interval(groups)
    first = _encode(groups, low, span, draws, shifts, bits)
    return (*first, *_encode(groups, low, span, second_draws, shifts, second_bits))


def decode_groups(packed: Tensor, scales: Tensor, *, bits: int, dtype: torch.dtype) -> tuple[Tensor]:
    """Return the values of groups, ``[n, group]``."""
    # In single precision at least: as float16 a bfloat16 scale may overflow or vanish.
    wide = torch.promote_types(dtype, torch.float32)
    values = unpack_bits(packed, bits, packed.shape[-1] * 8 // bits).to(wide)
    values = values.mul_(scales[..., 1:].to(wide)).add_(scales[..., :1].to(wide))
    if dtype is not torch.float16:
        return (values.to(dtype),)
    # Scales are rounded outwards: what lies beyond the largest float16 stands for it.
    largest = torch.finfo(torch.float16).max
    return (torch.where(values.isfinite(), values.clamp(-largest, largest), values).to(dtype),)


def scales_of(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return lowest value and step per group ``[n, 1]``, bfloat16 numbers that make the codes cover the group."""
    low, span = _interval(groups)
    return low, _step(span, bits)


def _interval(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest value, rounded down to bfloat16, and what the group spans above it."""
    wide = torch.promote_types(groups.dtype, torch.float32)
    low = _round_down(groups.amin(-1, keepdim=True).to(wide))
    return low, groups.amax(-1, keepdim=True).to(wide) - low


def _step(span: Tensor, bits: int) -> Tensor:
    return -_round_down(span * (-_MARGIN / (2**bits - 1)))


def _encode(
    groups: Tensor, low: Tensor, span: Tensor, draws: Tensor, shifts: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Return packed codes ``floor((x - low) / step + dither)`` and the scales.

    A group that is not finite, or constant, gets any codes: its scales make NaN, or one value, of them all.
    """
    step = _step(span, bits)
    position = (groups - low).div_(torch.where(step == 0, 1.0, step))
    # Not in place: under vmap the dither may have an axis that the entries do not have.
    position = position + (draws + shifts).frac_()
    # Positions are not negative, so that conversion, which cuts off, rounds down. Conversion to signed integers is done
    # many at a time.
    codes = position.to(torch.int16 if bits == 8 else torch.int8)
    codes = codes.to(torch.uint8) if bits == 8 else codes.view(torch.uint8)
    return pack_bits(codes, bits), torch.cat([low, step], -1).to(torch.bfloat16)


def _round_down(values: Tensor) -> Tensor:
    """Return the next bfloat16 number below or at `values`, held in their dtype; what is not finite stays so.

    By masking bits: a cast there and back may be elided by a compiler, which would quantise with a step other than the
    stored one and bias every value.
    """
    single = values.float()
    if values.dtype is torch.float64:
        below = torch.nextafter(single, single.new_full((), -torch.inf))
        single = torch.where(single.to(values.dtype) > values, below, single)
    bits = single.view(torch.int32)
    # Sign and magnitude: cutting off the lower half rounds a negative number up, unless a full half is added first.
    rounded = (bits + ((bits >> 31) & 0xFFFF)) & -0x10000
    # Only NaN differs from itself.
    return torch.where(single == single, rounded.view(torch.float32), single).to(values.dtype)
