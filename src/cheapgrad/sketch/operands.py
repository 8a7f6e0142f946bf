"""What a strategy may look at when it draws."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from cheapgrad.sketch.moment import Moment


class AbstractStoredMatrix(abc.ABC):
    """What backward has of the input X ``[N, I]``: X itself, or something random whose expectation is X."""

    #: True if the row axis is already sketched, so that cotangent rows need not be drawn again for dW.
    sketches_rows = False

    @abc.abstractmethod
    def dense(self) -> Tensor:
        """Return the stand-in for X, shape ``[N, I]``."""

    def rows(self, index_K: Tensor) -> Tensor:
        """Return the given rows of the stand-in, shape ``[K, I]``."""
        return self.dense().index_select(0, index_K)

    def contract(self, cotangent_NO: Tensor) -> Tensor:
        """Return ``cotangent.T @ stand-in``, shape ``[O, I]``."""
        return cotangent_NO.mT @ self.dense()


class DenseMatrix(AbstractStoredMatrix):
    """X itself."""

    def __init__(self, matrix_NI: Tensor) -> None:
        self._matrix_NI = matrix_NI

    def dense(self) -> Tensor:
        """Return X."""
        return self._matrix_NI


@dataclass(frozen=True)
class Operands:
    """The tensors of one layer, as far as they exist at the moment of drawing.

    Attributes:
        moment: when the draw happens; the cotangent exists only at ``Moment.COTANGENT``.
        stored: what is kept of X ``[N, I]``, or None where the weight needs no gradient.
        cotangent_NO: G, or None at forward time.
        weight_OI: W, or None where the input needs no gradient.
        examples: B; the N rows are B consecutive blocks of equal length.
        predicted_norm_N: a prediction of the cotangent's row norms from earlier steps, or None.
    """

    moment: Moment
    stored: AbstractStoredMatrix | None
    cotangent_NO: Tensor | None = None
    weight_OI: Tensor | None = None
    examples: int = 1
    predicted_norm_N: Tensor | None = None

    @property
    def targets(self) -> frozenset[str]:
        """Which gradients the draw will serve: ``"input"``, ``"weight"`` or both."""
        if self.moment is Moment.STORED:
            return frozenset({"weight"})
        wanted = set()
        if self.weight_OI is not None:
            wanted.add("input")
        if self.stored is not None:
            wanted.add("weight")
        return frozenset(wanted)

    def stored_dense(self) -> Tensor:
        """Return what is kept of X as a matrix."""
        if self.stored is None:
            raise RuntimeError("the input was not kept; scores that read it are only used where it is")
        return self.stored.dense()

    def cotangent(self) -> Tensor:
        """Return G; only strategies placed at backward time call this."""
        if self.cotangent_NO is None:
            raise RuntimeError("the cotangent does not exist at forward time; placement checks forbid this call")
        return self.cotangent_NO


def norm_along(matrix: Tensor, dim: int) -> Tensor:
    """Return Euclidean norms along `dim` (0 or 1 of a matrix, any of a stack), in single precision at least.

    Columns go through a matrix-vector product with ones: torch's norm over a leading axis is far slower on CPU.
    """
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    if dim == matrix.dim() - 1:
        return torch.linalg.vector_norm(matrix, dim=dim, dtype=dtype)
    squares = matrix.to(dtype).square()
    if matrix.dim() != 2:
        return squares.sum(dim).sqrt()
    return torch.mv(squares.mT, torch.ones(matrix.shape[0], dtype=dtype, device=matrix.device)).sqrt()
