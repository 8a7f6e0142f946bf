"""Scores: how much an atom (a row, a column, an example) is expected to matter."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cheapgrad.errors import BudgetError, check_fraction
from cheapgrad.sketch.operands import Operands, norm_along
from cheapgrad.sketch.value import Value

_BOTH = frozenset({"input", "weight"})


@dataclass(frozen=True, repr=False)
class AbstractScore(Value, abc.ABC):
    """A non-negative number per atom, computed from what exists at the moment of drawing.

    Class attributes declare what a score knows, so that placement can be checked before training:
    ``sees_cotangent`` (backward time only), ``axes`` (0 rows, 1 columns) and ``covers``, the gradients whose atoms are
    zero wherever the score is. For other gradients the strategy adds a small floor, or the estimate would be biased.
    """

    sees_cotangent: ClassVar[bool] = False
    axes: ClassVar[frozenset[int]] = frozenset({0, 1})
    covers: ClassVar[frozenset[str]] = frozenset()

    @abc.abstractmethod
    def evaluate(self, operands: Operands, dim: int) -> Tensor:
        """Return the scores along `dim` of the sketched matrix (0: rows, 1: columns)."""


@dataclass(frozen=True, repr=False)
class Uniform(AbstractScore):
    """Every atom alike."""

    covers: ClassVar[frozenset[str]] = _BOTH

    def evaluate(self, operands: Operands, dim: int) -> Tensor:
        """Return ones; infinity where an atom is not finite, so that a NaN is never dropped."""
        matrix = operands.cotangent_NO if operands.cotangent_NO is not None else operands.stored_dense()
        return equal_scores(matrix, 1 - dim)


@dataclass(frozen=True, repr=False)
class StoredNorm(AbstractScore):
    """``||x_n||`` for rows, ``||X_:i||`` for features: all that forward time can see.

    Where the weight is frozen nothing is stored; the cotangent's norms take their place at backward time.
    """

    covers: ClassVar[frozenset[str]] = frozenset({"weight"})

    def evaluate(self, operands: Operands, dim: int) -> Tensor:
        """Return norms of what is stored; the cotangent's where nothing is."""
        if operands.stored is None:
            return norm_along(operands.cotangent(), 1 - dim)
        norms = norm_along(operands.stored_dense(), 1 - dim)
        if operands.cotangent_NO is None:
            return norms
        # Blind to the cotangent, but for one thing: a row of it that is not finite is never dropped.
        return norms * equal_scores(operands.cotangent_NO, 1 - dim)


@dataclass(frozen=True, repr=False)
class CotangentNorm(AbstractScore):
    """``||g_n||`` for rows, ``||G_:j||`` for output columns."""

    sees_cotangent: ClassVar[bool] = True
    covers: ClassVar[frozenset[str]] = _BOTH

    def evaluate(self, operands: Operands, dim: int) -> Tensor:
        """Return norms of the cotangent."""
        return norm_along(operands.cotangent(), 1 - dim)


@dataclass(frozen=True, repr=False)
class ProductNorm(AbstractScore):
    """``||x_n|| ||g_n||``: optimal for dW alone along rows."""

    sees_cotangent: ClassVar[bool] = True
    axes: ClassVar[frozenset[int]] = frozenset({0})
    covers: ClassVar[frozenset[str]] = frozenset({"weight"})

    def evaluate(self, operands: Operands, dim: int) -> Tensor:
        """Return products of row norms; the cotangent's alone where the weight is frozen."""
        norm_N = norm_along(operands.cotangent(), 1)
        if operands.stored is None or operands.stored.sketches_rows:
            return norm_N
        return norm_N * norm_along(operands.stored_dense(), 1)


@dataclass(frozen=True, repr=False)
class JointNorm(AbstractScore):
    r"""The score that is optimal for dX and dW together.

    Rows: ``||g_n|| sqrt(||x_n||**2 / mean ||x||**2 + balance ||W^T g_n||**2 / (||g_n||**2 mean ||W||**2))``, with
    ``||W^T g_n||**2`` replaced by its average ``||g_n||**2 ||W||_F**2 / O``: each gradient's variance is measured
    relative to its own scale. Columns: ``||G_:j|| sqrt(1 + balance ||W_j||**2 / mean ||W||**2)``.

    Args:
        balance: weight of dX against dW, > 0 (1: alike).
    """

    balance: float = 1.0
    sees_cotangent: ClassVar[bool] = True
    covers: ClassVar[frozenset[str]] = _BOTH

    def __post_init__(self) -> None:
        is_number = isinstance(self.balance, (int, float)) and not isinstance(self.balance, bool)
        # At zero a vanishing row of X would get probability zero although dX needs it.
        if not is_number or not 0 < self.balance < math.inf:
            raise BudgetError(f"balance must be a finite number above 0, but got {self.balance!r}; try balance=1.0")

    def evaluate(self, operands: Operands, dim: int) -> Tensor:
        """Return the joint scores."""
        norm = norm_along(operands.cotangent(), 1 - dim)
        if operands.stored is None or operands.stored.sketches_rows or operands.weight_OI is None:
            return ProductNorm().evaluate(operands, dim) if dim == 0 else norm
        if dim == 0:
            other = norm_along(operands.stored_dense(), 1)
            return norm * (_relative_square(other) + self.balance).sqrt()
        return norm * (1 + self.balance * _relative_square(norm_along(operands.weight_OI, 1))).sqrt()


@dataclass(frozen=True, repr=False)
class ColumnNorm(AbstractScore):
    """``||G_:j|| ||W_j||``: optimal for dX alone along output columns, up to cross terms."""

    sees_cotangent: ClassVar[bool] = True
    axes: ClassVar[frozenset[int]] = frozenset({1})
    covers: ClassVar[frozenset[str]] = frozenset({"input"})

    def evaluate(self, operands: Operands, dim: int) -> Tensor:
        """Return products of column and weight-row norms; the cotangent's alone where the input needs no gradient."""
        norm_O = norm_along(operands.cotangent(), 0)
        if operands.weight_OI is None:
            return norm_O
        return norm_O * norm_along(operands.weight_OI, 1)


@dataclass(frozen=True, repr=False)
class PredictedNorm(AbstractScore):
    r"""``||x_n|| ĝ_t``, with ``ĝ_t`` a running mean of the cotangent's row norms at position t of the sequence.

    Forward time cannot see the cotangent; its scale by position in the sequence is remembered from earlier steps (one
    number per position and layer, no data-set indices). Before the first step, and for inputs without a sequence axis,
    this is `StoredNorm`. The memory is not updated inside compiled graphs and torch.func transforms.

    Args:
        momentum: share of the old mean kept per step, in (0, 1].
    """

    momentum: float = 0.9
    axes: ClassVar[frozenset[int]] = frozenset({0})
    covers: ClassVar[frozenset[str]] = frozenset({"weight"})

    def __post_init__(self) -> None:
        check_fraction("momentum", self.momentum)

    def evaluate(self, operands: Operands, dim: int) -> Tensor:
        """Return row norms of what is stored times the predicted norms of the cotangent."""
        norm_N = StoredNorm().evaluate(operands, dim)
        if operands.stored is None or operands.predicted_norm_N is None:
            return norm_N
        return norm_N * operands.predicted_norm_N


def equal_scores(matrix: Tensor, dim: int) -> Tensor:
    """Return 1 per atom along `dim`, infinity for atoms that are not finite."""
    finite = torch.isfinite(matrix.amax(dim)) & torch.isfinite(matrix.amin(dim))
    return torch.where(finite, 1.0, float("inf")).double()


def _relative_square(norms: Tensor) -> Tensor:
    squares = norms.double() ** 2
    mean = squares.mean()
    return squares / torch.where(mean > 0, mean, 1.0)


def with_floor(scores: Tensor, share: float = 0.1) -> Tensor:
    """Mix `scores` with their mean, so that no atom that may be non-zero has probability zero."""
    scores = scores.double()
    finite_mean = torch.where(torch.isfinite(scores), scores, 0.0).mean(-1, keepdim=True)
    return scores + share * finite_mean


def covered_scores(score: AbstractScore, operands: Operands, dim: int) -> Tensor:
    """Evaluate `score`, floored unless its zeros are zeros of every gradient the draw serves."""
    scores = score.evaluate(operands, dim)
    return scores if operands.targets <= score.covers else with_floor(scores)
