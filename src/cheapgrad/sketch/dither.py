r"""Dithers: numbers uniform on [0, 1) that decide what is rounded up, one draw shared by a block of features of a row.

A rounded entry is unbiased, and has the variance it has, whatever its dither has in common with the dithers of other
entries. In ``dW = G.T X`` an entry ``(o, i)`` sums over rows, in one feature: as long as no two rows share a draw its
variance is the sum over rows that independent dithers would give. Sampling, convolving (rows are pixels) and
multiplying entry by entry keep it so. Draws are slow on a CPU, so a block of up to 64 features of one row shares one.

What *mixes features of one row* sees covariances. Entry i of a block is shifted by a fixed ``c_i``, ``u_i = frac(u +
c_i)``, with ``c`` the van der Corput sequence: the dithers of a block are then spread over [0, 1) as evenly as can be,
as are those of every aligned run of 2, 4, 8, ... neighbours, so that errors of a common sign, the ones that add up in
sums over features, cancel instead.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from cheapgrad.sketch import random


@dataclass(frozen=True)
class Dither:
    """Dithers of ``[G, block]`` entries, as a draw per block and a shift per place.

    Attributes:
        draws: float32, shape ``[G, 1]``, or ``[G, block]`` where a block spans several rows; of images as
            `draw_plane_dither` says.
        shifts: float32, shape ``[block]``, or ``[1]`` where the draws are shifted already.
    """

    draws: Tensor
    shifts: Tensor

    def entries(self) -> Tensor:
        """Return the dithers themselves, one for each entry."""
        return torch.add(self.draws, self.shifts).frac_()


def draw_dither(like: Tensor, rows: int, columns: int, block: int) -> Dither:
    """Draw dithers for a matrix ``[rows, columns]`` in blocks of `block` consecutive entries, the last one padded.

    Args:
        like: a real activation; see `random.uniform`.
        rows: rows, no two of which share a draw within a column.
        columns: columns.
        block: entries of a block.
    """
    if columns >= block:
        # Consecutive entries, fewer than a row has: a block may reach into the next row, but never to the same column.
        count = -(-rows * columns // block)
        return Dither(random.uniform(like, (count, 1), double=False), _shifts(block, like.device))
    draws = random.uniform(like, (rows, 1), double=False)
    entries = torch.add(draws, _shifts(columns, like.device)).frac_().flatten()
    entries = torch.nn.functional.pad(entries, (0, -entries.shape[0] % block))
    return Dither(entries.view(-1, block), torch.zeros(1, device=like.device))


def draw_plane_dither(like: Tensor, batch: int, channels: int, pixels: int, block: int) -> Dither:
    """Draw dithers for images ``[batch, channels, pixels]``: up to `block` channels of one pixel share a draw.

    Args:
        like: a real activation; see `random.uniform`.
        batch: examples.
        channels: channels, which entries that share a draw differ in.
        pixels: pixels of a channel.
        block: most channels that share a draw; the largest divisor of `channels` up to it do.

    Returns:
        Draws ``[batch, blocks, 1, pixels]`` and shifts ``[channels / blocks, 1]``.
    """
    width = max(count for count in range(1, min(block, channels) + 1) if channels % count == 0)
    draws = random.uniform(like, (batch, channels // width, 1, pixels), double=False)
    return Dither(draws, _shifts(width, like.device).unsqueeze(1))


def _shifts(count: int, device: torch.device) -> Tensor:
    # The compiler looks through the cache, and warns of it.
    sequence = van_der_corput if torch.compiler.is_compiling() else _cached_sequence
    return torch.tensor(sequence(int(count)), dtype=torch.float32, device=device)


def van_der_corput(count: int) -> tuple[float, ...]:
    """Return the first `count` numbers of the van der Corput sequence in base 2: binary digits mirrored at the point.

    >>> van_der_corput(4)
    (0.0, 0.5, 0.25, 0.75)
    """
    digits = max(count - 1, 1).bit_length()
    return tuple(int(f"{index:0{digits}b}"[::-1], 2) / 2**digits for index in range(count))


_cached_sequence = functools.lru_cache(maxsize=64)(van_der_corput)
