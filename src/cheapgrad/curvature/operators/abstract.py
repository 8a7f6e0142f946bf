"""What every curvature matrix offers: a shape, products, and the micro-batches it is the mean of."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from cheapgrad.errors import NonFiniteCurvatureError, OperandError, ShapeError


class AbstractOperator(abc.ABC):
    """A real symmetric matrix that is known by its products only.

    ``operator @ vector_P`` and ``operator @ columns_PR`` return tensors of the operand's shape. Subclasses implement
    `shape`, `dtype`, `device` and `_multiply`; whoever has a matrix of another library passes it through `as_operator`.

    Law:
        A fixed operator is linear and symmetric: equal operands give equal products, and ``x·(A y) = y·(A x)``.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows and columns, equal."""

    @property
    @abc.abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype that operands must have and products have."""

    @property
    @abc.abstractmethod
    def device(self) -> torch.device:
        """The device that operands must be on and products are on."""

    @abc.abstractmethod
    def _multiply(self, columns_PR: Tensor) -> Tensor:
        """Return the product with checked columns ``[P, R]``, R ≥ 1."""

    @property
    def micro_batches(self) -> tuple[MicroBatch, ...]:
        """The operators that this one is the weighted mean of, one per micro-batch; itself where there are no parts.

        The weights sum to one and ``A @ v = Σ weight_i · (A_i @ v)``. Standard errors over micro-batches and cross-
        fitting are built on these; `MeanOperator` puts a selection of them together again.
        """
        return (MicroBatch(self, 1.0, self.example_count),)

    @property
    def example_count(self) -> float | None:
        """How many examples the matrix is a mean over, or None where that is not known."""
        return None

    def __matmul__(self, operand: Tensor) -> Tensor:
        """Multiply with a vector ``[P]`` or with columns ``[P, R]``.

        Args:
            operand: of the operator's dtype, on its device.

        Returns:
            A tensor like `operand`.

        Raises:
            ShapeError: if it is neither ``[P]`` nor ``[P, R]``.
            OperandError: if it is no tensor, or of another dtype or device.
            NonFiniteCurvatureError: if the product of a finite operand is not finite.
        """
        self._check_operand(operand)
        if operand.ndim == 2 and operand.shape[1] == 0:
            return torch.zeros_like(operand)
        with torch.no_grad():
            product = self._multiply(operand.detach().reshape(self.shape[1], -1)).reshape(operand.shape)
        # The sum of finite entries is finite unless it overflows, and it is far cheaper than a look at each.
        if not torch.isfinite(product.sum()) and not torch.isfinite(product).all():
            self._explain_non_finite(operand, product)
        return product

    def to_dense(self) -> Tensor:
        """Return the matrix ``[P, P]``, at the price of P products; for small problems and tests."""
        return self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.shape[0]}×{self.shape[1]}, {self.dtype}, {self.device}>"

    def _check_operand(self, operand: Tensor) -> None:
        size = self.shape[1]
        if not isinstance(operand, Tensor):
            raise OperandError(
                f"a {type(self).__name__} multiplies torch tensors, but got a {type(operand).__name__}; "
                "use torch.as_tensor(operand)"
            )
        if operand.ndim not in {1, 2} or operand.shape[0] != size:
            raise ShapeError(
                f"a {type(self).__name__} of shape {self.shape} multiplies a vector [{size}] or columns [{size}, R], "
                f"but got a tensor of shape {tuple(operand.shape)}"
            )
        if operand.dtype != self.dtype or operand.device != self.device:
            raise OperandError(
                f"a {type(self).__name__} of {self.dtype} on {self.device} got an operand of {operand.dtype} on "
                f"{operand.device}; use operand.to({self.device.type!r}, {self.dtype})"
            )

    def _explain_non_finite(self, operand: Tensor, product: Tensor) -> None:
        if not torch.isfinite(operand).all():
            raise NonFiniteCurvatureError(
                f"the operand of a {type(self).__name__} has {int((~torch.isfinite(operand)).sum())} entries that are "
                "not finite; look at where it was computed"
            )
        raise NonFiniteCurvatureError(
            f"the product of a {type(self).__name__} with a finite operand has {int((~torch.isfinite(product)).sum())} "
            f"of {product.numel()} entries that are not finite; look at the loss and the parameters, or use float64"
        )


@dataclass(frozen=True)
class MicroBatch:
    """One term of a mean of operators.

    Attributes:
        operator: the matrix of this micro-batch, itself a mean over the micro-batch's examples.
        weight: its share in the whole, in (0, 1]; the shares of all micro-batches sum to one.
        example_count: examples in it, or None where that is not known.
    """

    operator: AbstractOperator
    weight: float
    example_count: float | None = None
