"""Operators of other libraries: anything with a shape and ``@``."""

from __future__ import annotations

from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from cheapgrad.curvature.operators.abstract import AbstractOperator
from cheapgrad.curvature.operators.dense import DenseOperator, check_square
from cheapgrad.errors import OperatorError, ShapeError, describe_value


@final
class ForeignOperator(AbstractOperator):
    """A matrix of another library, by its ``shape`` and its ``@`` alone; build it with `as_operator`.

    Args:
        matrix: has ``shape`` and multiplies columns ``[P, R]``: torch tensors, or NumPy arrays if its dtype is NumPy's.
        dtype: of operands, where `matrix` does not say it.
        device: of operands, where `matrix` does not say it.
    """

    def __init__(self, matrix: Any, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        check_square(f"a {type(matrix).__name__}", tuple(matrix.shape))
        own: Any = getattr(matrix, "dtype", None)
        self._matrix = matrix
        self._is_numpy = own is not None and not isinstance(own, torch.dtype)
        self._dtype: torch.dtype = _torch_dtype(own) or dtype or torch.get_default_dtype()
        self._device = torch.device(device or getattr(matrix, "device", None) or "cpu")
        if self._is_numpy:
            self._device = torch.device("cpu")
        if not self._dtype.is_floating_point:
            raise OperatorError(
                f"curvature is real, but a {type(matrix).__name__} of {self._dtype} was given; convert it to float64"
            )

    @property
    def matrix(self) -> Any:
        """What was given."""
        return self._matrix

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return int(self._matrix.shape[0]), int(self._matrix.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """Torch's name of the matrix's dtype."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """The matrix's device; the CPU for NumPy and SciPy."""
        return self._device

    def _multiply(self, columns_PR: Tensor) -> Tensor:
        operand = columns_PR.numpy() if self._is_numpy else columns_PR
        product = torch.as_tensor(self._matrix @ operand)
        if product.shape != columns_PR.shape:
            raise ShapeError(
                f"a {type(self._matrix).__name__} returned the shape {tuple(product.shape)} for columns of shape "
                f"{tuple(columns_PR.shape)}; its @ has to return what it was given"
            )
        return product.to(self._dtype)


def _torch_dtype(dtype: Any) -> torch.dtype | None:
    """Return torch's name of a dtype of torch's or NumPy's."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    return torch.from_numpy(np.empty(0, dtype=dtype)).dtype


def as_operator(
    matrix: Any, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> AbstractOperator:
    """Return anything with ``shape`` and ``@`` as an operator; ours are returned as they are.

    Args:
        matrix: an operator, a tensor ``[P, P]``, a NumPy array, a SciPy sparse matrix or ``LinearOperator``, an
            operator of another library. It must be symmetric; nobody can see that from the outside, but `lanczos`
            notices where it is not.
        dtype: of operands, if `matrix` does not say it; torch's default otherwise.
        device: of operands, if `matrix` does not say it; the CPU otherwise.

    Returns:
        An `AbstractOperator`.

    Raises:
        OperatorError: if it has no ``shape`` or no ``@``, or is not square.

    Example:
        >>> import numpy as np
        >>> as_operator(np.diag([1.0, 2.0])) @ torch.ones(2, dtype=torch.float64)
        tensor([1., 2.], dtype=torch.float64)
    """
    if isinstance(matrix, AbstractOperator):
        return matrix
    if isinstance(matrix, Tensor):
        return DenseOperator(matrix)
    missing = [name for name in ("shape", "__matmul__") if not hasattr(matrix, name)]
    if missing:
        raise OperatorError(
            f"an operator has a shape and multiplies with @, but got {describe_value(matrix)}, which has no "
            f"{' and no '.join(missing)}; pass a tensor, a SciPy LinearOperator or an AbstractOperator"
        )
    return ForeignOperator(matrix, dtype, device)
