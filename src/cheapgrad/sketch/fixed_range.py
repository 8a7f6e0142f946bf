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

    Rows are packed one by one, so that any of them can be decoded alone, and in a row blocks of shared draws. A row
    that holds a NaN decodes to NaN: the codes have no room for it, so each row carries a flag (a bfloat16 zero or NaN).

    **Law** Bias 0. ``Var = step**2 f (1 - f)`` per entry, with f the place between two grid points. Up to 64 features
    of a row share a draw (see `cheapgrad.sketch.dither`).
    Saved: ``ceil(I * bits / 8) + 2`` bytes per row.
    """

    grid: Grid

    def draw(self, like: Tensor, rows: int, columns: int) -> Dither:
        """Draw the dithers of a whole matrix, laid out as `blocks` lays out its entries."""
        dither = draw_dither(like, rows, columns, _BLOCK)
        if columns % _BLOCK == 0:
            return Dither(dither.draws.view(rows, columns // _BLOCK, 1), dither.shifts)
        entries = dither.entries().flatten()[: rows * columns]
        return Dither(entries.view(rows, 1, columns), torch.zeros(1, device=like.device))

    def blocks(self, matrix_NI: Tensor) -> Tensor:
        """Return ``[N, blocks, block]``: blocks of shared draws, or whole rows where blocks do not divide them."""
        rows, columns = matrix_NI.shape
        block = _BLOCK if columns % _BLOCK == 0 else columns
        return matrix_NI.view(rows, columns // max(block, 1), block)

    def encode(self, values: Tensor, draws: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
        """Return packed codes ``[N, ceil(I * bits / 8)]`` and a flag per row; a pure function for `fusing`.

        Args:
            values: float32 or float64, in blocks, values that the grid covers.
            draws: those of the dither that `draw` returned, of the same rows.
            shifts: those of the dither.
        """
        grid = self.grid
        flags = (values.amax((1, 2)).unsqueeze(1) * 0).to(torch.bfloat16)
        # Not in place: under vmap one of them may have an axis that the other does not have.
        position = torch.add((draws + shifts).frac_(), values, alpha=1 / grid.step)
        # The largest position plus a dither may round to one code too many. Conversion cuts off, which rounds down.
        position = position.sub_(grid.low / grid.step).clamp_(max=2**grid.bits - 0.5)
        small = position.to(torch.int16 if grid.bits == 8 else torch.int8)
        codes = small.to(torch.uint8) if grid.bits == 8 else small.view(torch.uint8)
        return pack_bits(codes, grid.bits).flatten(1), flags

    def decode(self, packed: Tensor, flags: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """Return the values in blocks, in float32 at least; a pure function for `fusing`.

        Args:
            packed: as `encode` returned them.
            flags: as `encode` returned them.
            columns: I.
            dtype: of the result, where it is wide enough.
        """
        wide = torch.promote_types(dtype, torch.float32)
        block = _BLOCK if columns % _BLOCK == 0 else columns
        codes = unpack_bits(packed.view(packed.shape[0], columns // block, -1), self.grid.bits, block).to(wide)
        return codes.mul_(self.grid.step).add_((flags.to(wide) + self.grid.low).unsqueeze(2))

    def entry_variance(self, values: Tensor) -> Tensor:
        """Return ``step**2 f (1 - f)`` per entry, in float64."""
        position = (values.double() - self.grid.low) / self.grid.step
        fraction = position - position.floor()
        return self.grid.step**2 * fraction * (1 - fraction)
