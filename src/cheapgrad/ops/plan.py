"""What a layer does in its backward pass: the static half of a sketched operation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cheapgrad.sketch import AbstractStrategy, DenseMatrix, Moment, Operands
from cheapgrad.sketch._strategy import AbstractDrawnCotangent
from cheapgrad.sketch.operands import AbstractStoredMatrix


class RootUse:
    """What earlier forward passes showed of an input: whether it is kept anyway, and codes would be for nothing.

    Attributes:
        is_kept: whether somebody recomputes from it, as attention does its queries, keys and values.
    """

    def __init__(self) -> None:
        self.is_kept = False


@dataclass(frozen=True)
class Plan:
    """Strategies of one layer, with the running estimates they keep.

    Attributes:
        stored: strategy for what is kept of X, or None to keep X.
        cotangent: strategy for G, or None to use G.
        stored_memory: running estimates of `stored`, or None.
        cotangent_memory: running estimates of `cotangent`, or None.
        recompute: whether what other operations keep of the output is computed again in backward.
        root_use: what is known of the use of the input, or None where nothing is recomputed.
        text: the strategies as plain data, for compiled graphs, or empty.
    """

    stored: AbstractStrategy | None = None
    cotangent: AbstractStrategy | None = None
    stored_memory: Any = field(default=None, compare=False, repr=False)
    cotangent_memory: Any = field(default=None, compare=False, repr=False)
    recompute: bool = False
    root_use: RootUse | None = field(default=None, compare=False, repr=False)
    text: str = field(default="", compare=False, repr=False)

    @property
    def is_exact(self) -> bool:
        """Whether both moments have a full budget."""
        return all(strategy is None or strategy.is_exact for strategy in (self.stored, self.cotangent))

    def keep(self, matrix_NI: Tensor, examples: int) -> tuple[Tensor, ...]:
        """Return what is kept of X, as plain tensors; nothing where X is kept whole."""
        if self.stored is None:
            return ()
        with torch.no_grad():
            operands = Operands(Moment.STORED, DenseMatrix(matrix_NI.detach()), examples=examples)
            return self.stored.store(operands, self.stored_memory)

    def restore(self, kept: tuple[Tensor, ...], rows: int, inputs: int, dtype: torch.dtype) -> AbstractStoredMatrix:
        """Return kept tensors as a stand-in for X."""
        if self.stored is None:
            raise RuntimeError("this plan keeps X itself; there is nothing to restore")
        return self.stored.restore(kept, rows, inputs, dtype)

    def draw(self, operands: Operands) -> AbstractDrawnCotangent:
        """Return a drawn stand-in for the cotangent."""
        if self.cotangent is None:
            raise RuntimeError("this plan uses the cotangent itself; there is nothing to draw")
        return self.cotangent.draw(operands, self.cotangent_memory)

    def observe(self, cotangent_NO: Tensor, examples: int) -> None:
        """Let running estimates take in a cotangent."""
        if self.stored is not None:
            self.stored.observe(cotangent_NO, examples, self.stored_memory)


def poison(matrix: Tensor) -> Tensor:
    """Return 0 if `matrix` is finite and NaN otherwise (0-dim): added to dW, it keeps a NaN in dropped rows visible.

    By a sum, the cheapest pass there is; entries so large that their sum overflows count as not finite.
    """
    if not matrix.is_floating_point():
        return torch.zeros((), device=matrix.device)
    return matrix.sum(dtype=torch.promote_types(matrix.dtype, torch.float32)) * 0


class PoisonedRows(AbstractStoredMatrix):
    """A stored matrix whose chosen rows carry a NaN if any entry does: one row is enough to reach all of dW."""

    def __init__(self, stored: AbstractStoredMatrix, kept: tuple[Tensor, ...]) -> None:
        self._stored = stored
        self._kept = kept

    def dense(self) -> Tensor:
        """Return the stored matrix as it is."""
        return self._stored.dense()

    def rows(self, index_K: Tensor) -> Tensor:
        """Return the given rows, the first one plus the poison."""
        rows_KI = self._stored.rows(index_K)
        for tensor in self._kept:
            rows_KI[:1].add_(poison(tensor))
        return rows_KI
