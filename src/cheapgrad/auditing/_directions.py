"""The fixed directions along which the errors of a random gradient are looked at."""

from __future__ import annotations

import torch
from torch import Tensor

# Into how many blocks of neighbouring rows, and of neighbouring columns, a tensor is cut, and how many entries a block
# has at least: few enough for a bias in a corner to show, enough for a sum to be near normal.
MOST_BLOCKS = 8
_LEAST_ENTRIES = 64
_SIGN_PATTERNS = 2


class Directions:
    """Directions for one tensor, seen as a matrix: its first axis by all others.

    They are the exact gradient itself, the parts of it in blocks of neighbouring rows and of neighbouring columns, and,
    in the same blocks, signs: products of a random sign for each row and one for each column. A sum over many entries
    is near normal where a single entry is not. Only signs for rows and for columns are held.

    Args:
        exact: the exact gradient; kept as it is, so give a copy.
        seed: of the signs.
        most_blocks: into how many blocks an axis is cut at most.
    """

    def __init__(self, exact: Tensor, seed: int, most_blocks: int = MOST_BLOCKS) -> None:
        self.exact = exact.detach()
        rows = exact.shape[0] if exact.dim() else 1
        self._shape = (rows, exact.numel() // max(rows, 1))
        generator = torch.Generator().manual_seed(seed)
        self._row_sign, self._column_sign = (
            (2 * torch.randint(0, 2, (size, _SIGN_PATTERNS), generator=generator) - 1).to(exact.device, torch.float64)
            for size in self._shape
        )
        enough = max(1, exact.numel() // _LEAST_ENTRIES)
        self._row_blocks, self._column_blocks = (
            _membership(size, min(most_blocks, size, enough)).to(exact.device) for size in self._shape
        )
        # A single block is the whole tensor, and its signs are those of the other axis.
        self._cuts_rows, self._cuts_columns = len(self._row_blocks) > 1, len(self._column_blocks) > 1
        self.squared_norm = float(self._as_matrix(exact).square().sum())

    def project(self, error: Tensor) -> Tensor:
        """Return the projections of an error of the tensor's shape, float64; that on the exact gradient comes first."""
        error_RC = self._as_matrix(error)
        signed_rows = (error_RC @ self._column_sign).mul_(self._row_sign)
        signed_columns = (error_RC.T @ self._row_sign).mul_(self._column_sign) if self._cuts_columns else None
        return self._assemble(self._along(error_RC * self._as_matrix(self.exact)), signed_rows, signed_columns)

    def resolutions(self, unit: float, tolerance: float) -> Tensor:
        """Return how large a projection may be without being a bias.

        Args:
            unit: rounding of an entry; those of different entries are taken as independent.
            tolerance: an error in a block that is no longer than this fraction of the gradient there is forgiven.
        """
        squared_RC = self._as_matrix(self.exact).square()
        along = self._along(squared_RC)
        rows, columns = self._shape
        in_rows = squared_RC.sum(1, keepdim=True).expand(-1, _SIGN_PATTERNS)
        in_columns = squared_RC.sum(0).unsqueeze(1).expand(-1, _SIGN_PATTERNS)
        squares = self._assemble(along, in_rows, in_columns)
        entries = self._assemble(along, torch.full_like(in_rows, columns), torch.full_like(in_columns, rows))
        forgiven = unit * entries.sqrt() + tolerance * (entries * squares).sqrt()
        forgiven[: len(along)] = unit * along.sqrt() + tolerance * along
        return forgiven

    def _along(self, products_RC: Tensor) -> Tensor:
        """Return the sum of all products, then those of the blocks of rows and of columns."""
        parts = [products_RC.sum().view(1)]
        if self._cuts_rows:
            parts.append(self._row_blocks @ products_RC.sum(1))
        if self._cuts_columns:
            parts.append(self._column_blocks @ products_RC.sum(0))
        return torch.cat(parts)

    def _assemble(self, along: Tensor, by_row: Tensor, by_column: Tensor | None) -> Tensor:
        parts = [along, (self._row_blocks @ by_row).flatten()]
        if self._cuts_columns and by_column is not None:
            parts.append((self._column_blocks @ by_column).flatten())
        return torch.cat(parts)

    def _as_matrix(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self._shape).double()


def _membership(size: int, blocks: int) -> Tensor:
    """Return which of the blocks every position lies in, as ones and zeros, shape ``[blocks, size]``, float64."""
    block_of = torch.arange(size) * blocks // max(size, 1)
    return (block_of == torch.arange(max(blocks, 1)).unsqueeze(1)).double()
