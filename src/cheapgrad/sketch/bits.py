"""Packing of small integers into bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack integers of `bits` bits (1, 2, 4 or 8) into bytes along the last axis.

    The axis is cut into ``8 / bits`` equal runs, zeros appended where it does not divide, and byte j holds the j-th
    codes of all runs: whole runs are added, which processors do many bytes at a time.

    Args:
        codes: uint8, shape ``[..., n]``; bits above the lowest `bits` are dropped.
        bits: width of a code.

    Returns:
        uint8, shape ``[..., ceil(n * bits / 8)]``.

    >>> pack_bits(torch.tensor([1, 2, 3, 0, 1], dtype=torch.uint8), 2)
    tensor([29,  2], dtype=torch.uint8)
    """
    if bits == 8:
        return codes
    per_byte = 8 // bits
    missing = -codes.shape[-1] % per_byte
    if missing:
        codes = torch.nn.functional.pad(codes, (0, missing))
    width = codes.shape[-1] // per_byte
    codes = codes & ((1 << bits) - 1)
    packed = codes.narrow(-1, 0, width)
    for run in range(1, per_byte):
        # A product and a sum, in one pass of many bytes at a time; shifts take one byte at a time.
        packed = torch.add(packed, codes.narrow(-1, run * width, width), alpha=1 << (run * bits))
    return packed


def unpack_bits(packed: Tensor, bits: int, length: int) -> Tensor:
    """Return the first `length` codes of the last axis that `pack_bits` packed, as uint8.

    >>> unpack_bits(torch.tensor([29, 2], dtype=torch.uint8), 2, 5)
    tensor([1, 2, 3, 0, 1], dtype=torch.uint8)
    """
    if bits == 8:
        return packed.narrow(-1, 0, length)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).unsqueeze(1)
    codes = ((packed.unsqueeze(-2) >> shifts) & ((1 << bits) - 1)).flatten(-2)
    return codes.narrow(-1, 0, length)


def unpack_flags(packed: Tensor, length: int) -> Tensor:
    """Return the first `length` bits of the last axis that `pack_bits` packed, as booleans in eight runs.

    Args:
        packed: uint8, shape ``[..., ceil(length / 8)]``.
        length: a multiple of 8.

    Returns:
        ``[..., 8, length / 8]``: the bits in order, which a compiler works on many at a time as long as the runs are an
        axis of their own.

    >>> unpack_flags(torch.tensor([3], dtype=torch.uint8), 8).flatten().tolist()
    [True, True, False, False, False, False, False, False]
    """
    # Compiled, wider integers are worked on many at a time; one after the other, narrower ones are.
    dtype = torch.int32 if torch.compiler.is_compiling() else torch.uint8
    masks = (1 << torch.arange(8, dtype=torch.int32, device=packed.device)).to(dtype).unsqueeze(1)
    return (packed.to(dtype).unsqueeze(-2) & masks) != 0
