"""Packing of small integers into bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack integers of `bits` bits (1, 2, 4 or 8) into bytes.

    Args:
        codes: uint8, shape ``[n]``, values in ``[0, 2**bits)``.
        bits: width of a code.

    Returns:
        uint8, shape ``[ceil(n * bits / 8)]``.

    >>> pack_bits(torch.tensor([1, 2, 3, 0, 1], dtype=torch.uint8), 2)
    tensor([57,  1], dtype=torch.uint8)
    """
    if bits == 8:
        return codes
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[0] % per_byte)).view(-1, per_byte)
    packed = padded[:, 0]
    for position in range(1, per_byte):
        packed = packed | (padded[:, position] << (position * bits))
    return packed


def unpack_bits(packed: Tensor, bits: int, length: int) -> Tensor:
    """Return the first `length` codes that `pack_bits` packed, as uint8.

    >>> unpack_bits(torch.tensor([57, 1], dtype=torch.uint8), 2, 5)
    tensor([1, 2, 3, 0, 1], dtype=torch.uint8)
    """
    if bits == 8:
        return packed[:length]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (packed.unsqueeze(1) >> shifts) & ((1 << bits) - 1)
    return codes.flatten()[:length]
