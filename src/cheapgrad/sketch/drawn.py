"""How drawn sketches are multiplied: along rows, along columns, as factors, or as a dense stand-in."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from cheapgrad.sketch._strategy import AbstractDrawnCotangent
from cheapgrad.sketch.operands import AbstractStoredMatrix
from cheapgrad.sketch.selection import Selection


class AxisSketch(Protocol):
    """A drawn random map of one axis: ``E[lift(apply(t))] = t``, and `lift` is the transpose of `gather`."""

    def apply(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Sketch `tensor` along `dim`, weights included."""
        ...

    def gather(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Sketch the partner of a contraction along `dim`."""
        ...

    def gather_rows(self, stored: AbstractStoredMatrix) -> Tensor:
        """Sketch the rows of a stored stand-in, rebuilding only those that are needed."""
        ...

    def lift(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Map back to full length along `dim`."""
        ...


class StoredRows(AbstractStoredMatrix):
    """X sketched along its rows: ``S X``, with the sketch that made it."""

    sketches_rows = True

    def __init__(self, sketch: AxisSketch, sketched_KI: Tensor) -> None:
        self._sketch = sketch
        self._sketched_KI = sketched_KI

    def dense(self) -> Tensor:
        """Return the unbiased stand-in for X."""
        return self._sketch.lift(self._sketched_KI, 0)

    def contract(self, cotangent_NO: Tensor) -> Tensor:
        """Return ``(S G).T @ (S X)``."""
        return self._sketch.gather(cotangent_NO, 0).mT @ self._sketched_KI


class StoredColumns(AbstractStoredMatrix):
    """X sketched along its features: ``X S.T``, with the sketch that made it."""

    def __init__(self, sketch: AxisSketch, sketched_NK: Tensor) -> None:
        self._sketch = sketch
        self._sketched_NK = sketched_NK

    def dense(self) -> Tensor:
        """Return the unbiased stand-in for X."""
        return self._sketch.lift(self._sketched_NK, 1)

    def rows(self, index_K: Tensor) -> Tensor:
        """Return rows of the stand-in."""
        return self._sketch.lift(self._sketched_NK.index_select(0, index_K), 1)

    def contract(self, cotangent_NO: Tensor) -> Tensor:
        """Return ``(G.T X S.T) S``: zero in the features that were not kept."""
        return self._sketch.lift(cotangent_NO.mT @ self._sketched_NK, 1)


class StoredFactors(AbstractStoredMatrix):
    """X as a random product of two thin factors."""

    def __init__(self, left_NR: Tensor, right_RI: Tensor) -> None:
        self._left_NR = left_NR
        self._right_RI = right_RI

    def dense(self) -> Tensor:
        """Return the product of the factors."""
        return self._left_NR @ self._right_RI

    def rows(self, index_K: Tensor) -> Tensor:
        """Return rows of the product."""
        return self._left_NR.index_select(0, index_K) @ self._right_RI

    def contract(self, cotangent_NO: Tensor) -> Tensor:
        """Return ``(G.T left) right``."""
        return (cotangent_NO.mT @ self._left_NR) @ self._right_RI


class DrawnRows(AbstractDrawnCotangent):
    """A cotangent sketched along its rows; serves dX and dW alike."""

    def __init__(self, sketch: AxisSketch, cotangent_NO: Tensor, weight_OI: Tensor | None = None) -> None:
        self.sketch = sketch
        self._cotangent_NO = cotangent_NO
        self._weight_OI = weight_OI
        self._sketched_KO: Tensor | None = None

    @property
    def sketched_KO(self) -> Tensor:
        """The sketched cotangent, computed once."""
        if self._sketched_KO is None:
            self._sketched_KO = self.sketch.apply(self._cotangent_NO, 0)
        return self._sketched_KO

    def dense(self) -> Tensor:
        """Return the stand-in for G."""
        return self.sketch.lift(self.sketched_KO, 0)

    def input_gradient(self, weight_OI: Tensor) -> Tensor:
        """Return ``S.T ((S G) W)``."""
        return self.sketch.lift(self.sketched_KO @ weight_OI, 0)

    def weight_gradient(self, stored: AbstractStoredMatrix) -> Tensor:
        """Return ``(S G).T (S X)``; where X's rows are sketched already, G is not sketched again."""
        if stored.sketches_rows:
            return stored.contract(self._cotangent_NO)
        stored_KI = self.sketch.gather_rows(stored)
        if isinstance(self.sketch, Selection) and self.sketch.watch is not None:
            self.sketch.watch(self.sketched_KO, stored_KI, self._weight_OI)
        return self.sketched_KO.mT @ stored_KI


class DrawnColumns(AbstractDrawnCotangent):
    """A cotangent sketched along its output features; dW is zero in the rows that were not kept."""

    def __init__(self, sketch: AxisSketch, cotangent_NO: Tensor) -> None:
        self.sketch = sketch
        self.sketched_NK = sketch.apply(cotangent_NO, 1)

    def dense(self) -> Tensor:
        """Return the stand-in for G."""
        return self.sketch.lift(self.sketched_NK, 1)

    def input_gradient(self, weight_OI: Tensor) -> Tensor:
        """Return ``(G S.T) (S W)``."""
        return self.sketched_NK @ self.sketch.gather(weight_OI, 0)

    def weight_gradient(self, stored: AbstractStoredMatrix) -> Tensor:
        """Return the kept rows of dW in place."""
        return self.sketch.lift(stored.contract(self.sketched_NK), 0)


class DrawnFactors(AbstractDrawnCotangent):
    """A cotangent as a random product of two thin factors."""

    def __init__(self, left_NR: Tensor, right_RO: Tensor) -> None:
        self._left_NR = left_NR
        self._right_RO = right_RO

    def dense(self) -> Tensor:
        """Return the product of the factors."""
        return self._left_NR @ self._right_RO

    def input_gradient(self, weight_OI: Tensor) -> Tensor:
        """Return ``left (right W)``."""
        return self._left_NR @ (self._right_RO @ weight_OI)

    def weight_gradient(self, stored: AbstractStoredMatrix) -> Tensor:
        """Return ``right.T (left.T X)``."""
        return self._right_RO.mT @ stored.contract(self._left_NR)


class DrawnDense(AbstractDrawnCotangent):
    """A random dense stand-in: nothing is saved in the products."""

    def __init__(self, stand_in_NO: Tensor) -> None:
        self._stand_in_NO = stand_in_NO

    def dense(self) -> Tensor:
        """Return the stand-in for G."""
        return self._stand_in_NO

    def input_gradient(self, weight_OI: Tensor) -> Tensor:
        """Return ``stand-in @ W``."""
        return self._stand_in_NO @ weight_OI

    def weight_gradient(self, stored: AbstractStoredMatrix) -> Tensor:
        """Return ``stand-in.T @ X``."""
        return stored.contract(self._stand_in_NO)


class StoredDense(AbstractStoredMatrix):
    """A random dense stand-in that was rebuilt from something smaller."""

    def __init__(self, stand_in_NI: Tensor) -> None:
        self._stand_in_NI = stand_in_NI

    def dense(self) -> Tensor:
        """Return the stand-in for X."""
        return self._stand_in_NI


def one_hot_rows(index_K: Tensor, weight_K: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Return the selection as a matrix ``[K, size]`` with one weight per row."""
    matrix = torch.zeros(index_K.shape[0], size, dtype=dtype, device=index_K.device)
    return matrix.scatter(1, index_K.unsqueeze(1), weight_K.to(dtype).unsqueeze(1))
