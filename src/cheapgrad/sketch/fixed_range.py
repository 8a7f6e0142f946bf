"""Stochastic rounding of values from a known interval: no scales to find, and none to keep."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cheapgrad.sketch.bits import pack_bits, unpack_bits
from cheapgrad.sketch.dither import Dither, draw_dither

# Entries of a row that share a draw.
_BLOCK = 64
# By how much a grid may be coarser than the finest that covers the interval, so that a value of note lies on it.
_COARSER = 1.25


@dataclass(frozen=True)
class Grid:
    """``2**bits`` equidistant numbers that cover an interval: ``low + code * step``."""

    low: float
    step: float
    bits: int

    @classmethod
    def covering(cls, low: float, high: float, exact: float, bits: int) -> Grid:
        """Return a grid over ``[low, high]`` with 0 and `exact` on it, unless that takes much larger steps.

        Args:
            low: lowest value, at most 0.
            high: highest value, at least `exact`.
            exact: a value that many entries have, such as the slope far from the origin; it then has no rounding error.
            bits: 2, 4 or 8.

        >>> Grid.covering(-0.13, 1.13, 1.0, 4)
        Grid(low=-0.18181818181818182, step=0.09090909090909091, bits=4)
        """
        last = 2**bits - 1
        finest = (high - low) / last
        for parts in range(math.floor(exact / finest * (1 + 1e-9)), 0, -1):
            step = exact / parts
            first = math.floor(low / step)
            if step > _COARSER * finest:
                break
            if math.ceil(high / step * (1 - 1e-9)) - first <= last:
                return cls(first * step, step, bits)
        return cls(low, finest, bits)


@dataclass(frozen=True)
class FixedRange:
    r"""Round entries of a matrix ``[N, I]`` to a grid, up or down at random so that the expectation is the entry.

    Rows are packed one by one, so that any of them can be decoded alone. A row that holds a NaN decodes to NaN: the
    codes have no room for it, so each row carries a flag (a bfloat16 zero or NaN).

    **Law** Bias 0. ``Var = step**2 f (1 - f)`` per entry, with f the place between two grid points. Up to 64 features
    of a row share a draw (see `cheapgrad.sketch.dither`).
    Saved: ``ceil(I * bits / 8) + 2`` bytes per row.
    """

    grid: Grid

    def draw(self, like: Tensor, rows: int, columns: int) -> Dither:
        """Draw the dithers of a whole matrix."""
        return draw_dither(like, rows, columns, _BLOCK)

    def rows_per_piece(self, columns: int, entries: int) -> int:
        """Return how many rows make about `entries` entries and whole blocks of shared draws."""
        unit = _BLOCK // math.gcd(columns, _BLOCK)
        return max(1, entries // (columns * unit)) * unit

    def encode(self, values_NI: Tensor, dither: Dither, start: int = 0) -> tuple[Tensor, Tensor]:
        """Return packed codes and flags of rows of the matrix.

        Args:
            values_NI: float32 or float64, values that the grid covers.
            dither: what `draw` gave for the whole matrix.
            start: which row of the matrix the first one is; its first entry begins a block of draws.
        """
        rows, columns = values_NI.shape
        first = start * columns // _BLOCK
        blocks = slice(first, first + -(-rows * columns // _BLOCK))
        dither_NI = dither.part(blocks).flatten()[: rows * columns].view(rows, columns)
        flags = (values_NI.amax(1, keepdim=True) * 0).to(torch.bfloat16)
        grid = self.grid
        position = torch.add(dither_NI, values_NI, alpha=1 / grid.step)
        # The largest position plus a dither may round to one code too many. Conversion cuts off, which rounds down.
        position = position.sub_(grid.low / grid.step).clamp_(max=2**grid.bits - 0.5)
        small = position.to(torch.int16 if grid.bits == 8 else torch.int8)
        codes = small.to(torch.uint8) if grid.bits == 8 else small.view(torch.uint8)
        return pack_bits(codes, grid.bits), flags

    def decode(self, packed: Tensor, flags: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """Return the values, shape ``[N, columns]``, in float32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        codes = unpack_bits(packed, self.grid.bits, columns).to(wide)
        return codes.mul_(self.grid.step).add_(flags.to(wide) + self.grid.low)

    def entry_variance(self, values: Tensor) -> Tensor:
        """Return ``step**2 f (1 - f)`` per entry, in float64."""
        position = (values.double() - self.grid.low) / self.grid.step
        fraction = position - position.floor()
        return self.grid.step**2 * fraction * (1 - fraction)
