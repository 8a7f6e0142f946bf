"""A matrix that is there in full."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from cheapgrad.curvature.operators.abstract import AbstractOperator
from cheapgrad.errors import OperatorError, check_instance


@final
class DenseOperator(AbstractOperator):
    """A symmetric matrix as an operator, for closed forms, tests and small problems.

    Args:
        matrix: ``[P, P]``, floating point and symmetric up to rounding.
        example_count: examples it is a mean over, if it is one.

    Raises:
        OperatorError: if it is not a square, symmetric, floating-point matrix.

    Example:
        >>> DenseOperator(torch.diag(torch.tensor([2.0, 5.0]))) @ torch.ones(2)
        tensor([2., 5.])
    """

    def __init__(self, matrix: Tensor, *, example_count: float | None = None) -> None:
        check_instance("matrix", matrix, Tensor, "use torch.as_tensor(matrix)")
        check_square("a dense operator", tuple(matrix.shape))
        if not matrix.is_floating_point():
            raise OperatorError(f"a dense operator needs a floating-point matrix, but got {matrix.dtype}")
        gap, size = float((matrix - matrix.T).abs().max()), float(matrix.abs().max())
        # Products of two factors are symmetric up to rounding only.
        if gap > 1e3 * torch.finfo(matrix.dtype).eps * size:
            raise OperatorError(
                f"a curvature matrix is symmetric, but this one differs from its transpose by up to {gap:.3g} "
                f"at entries of up to {size:.3g}; use (matrix + matrix.T) / 2 if that is what is meant"
            )
        self._matrix_PP = matrix.detach()
        self._example_count = example_count

    @property
    def matrix(self) -> Tensor:
        """The matrix ``[P, P]``."""
        return self._matrix_PP

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self._matrix_PP.shape[0], self._matrix_PP.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The matrix's dtype."""
        return self._matrix_PP.dtype

    @property
    def device(self) -> torch.device:
        """The matrix's device."""
        return self._matrix_PP.device

    @property
    def example_count(self) -> float | None:
        """What was given."""
        return self._example_count

    def _multiply(self, columns_PR: Tensor) -> Tensor:
        return self._matrix_PP @ columns_PR


def check_square(name: str, shape: tuple[int, ...]) -> None:
    """Raise `OperatorError` unless the shape is that of a non-empty square matrix."""
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise OperatorError(f"{name} must be a square matrix with at least one row, but got the shape {tuple(shape)}")
