"""Products with the inverse of a damped empirical Fisher matrix that is never formed."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from cheapgrad.curvature.operators import AbstractOperator
from cheapgrad.errors import (
    BudgetError,
    NonFiniteCurvatureError,
    ShapeError,
    SingularCurvatureError,
    check_count,
    check_instance,
)


@final
class InverseFisher(AbstractOperator):
    """``(damping + (1/M) Σ_m g_m g_mᵀ)⁻¹`` for M fixed gradients.

    With ``G [M, P]`` and the Cholesky factor ``L Lᵀ = M damping + G Gᵀ``, Woodbury's identity gives
    ``(1 - Vᵀ V) / damping`` with ``V = L⁻¹ G``, which is all that is kept.

    Args:
        gradients_NP: the gradients, one a row.
        damping: positive.

    Law:
        Exact up to rounding. Cost: ``M² P`` multiplications and ``M³ / 3`` to set up, ``2 M P`` a product, M an entry;
        memory M P. The gradients are those of a batch: the inverse is large where these happen to be small.

    Raises:
        ShapeError: if the gradients are not rows.
        SingularCurvatureError: if the damping is not positive.
        NonFiniteCurvatureError: if a gradient is not finite.

    Example:
        >>> inverse = InverseFisher(torch.tensor([[2.0, 0.0]]), damping=1.0)
        >>> inverse @ torch.tensor([5.0, 1.0]), inverse.diagonal()
        (tensor([1., 1.]), tensor([0.2000, 1.0000]))

    References:
        Frantar, Kurtic and Alistarh, "M-FAC" (arXiv:2107.03430), static version: the same products, entries and cost
        there come from a recursion over gradients, here from one factorisation.
    """

    def __init__(self, gradients_NP: Tensor, *, damping: float) -> None:
        check_instance("gradients", gradients_NP, Tensor, "use torch.stack(gradients)")
        if gradients_NP.ndim != 2 or 0 in gradients_NP.shape:
            raise ShapeError(f"gradients must be rows [M, P], at least one, but got {tuple(gradients_NP.shape)}")
        self._damping = _check_positive(damping)
        _check_finite(gradients_NP)
        gram_NN = gradients_NP @ gradients_NP.T
        gram_NN.diagonal().add_(len(gradients_NP) * damping)
        factor_NN = torch.linalg.cholesky(gram_NN)
        self._rows_NP = torch.linalg.solve_triangular(factor_NN, gradients_NP.detach(), upper=False)

    @property
    def shape(self) -> tuple[int, int]:
        """P, twice."""
        return self._rows_NP.shape[1], self._rows_NP.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The gradients' dtype."""
        return self._rows_NP.dtype

    @property
    def device(self) -> torch.device:
        """The gradients' device."""
        return self._rows_NP.device

    def diagonal(self) -> Tensor:
        """Return the diagonal ``[P]``."""
        return (1 - self._rows_NP.square().sum(0)) / self._damping

    def entry(self, row: int, column: int) -> Tensor:
        """Return one entry of the inverse, a scalar.

        Args:
            row: index of a parameter.
            column: index of a parameter.
        """
        size = self.shape[0]
        for index in (row, column):
            if not -size <= index < size:
                raise ShapeError(f"an index must be from 0 to {size - 1}, but got {index}")
        product = self._rows_NP[:, row] @ self._rows_NP[:, column]
        return (float(row % size == column % size) - product) / self._damping

    def _multiply(self, columns_PR: Tensor) -> Tensor:
        return (columns_PR - self._rows_NP.T @ (self._rows_NP @ columns_PR)) / self._damping


@final
class SlidingInverseFisher(AbstractOperator):
    """The same for the last M gradients of a run: the oldest makes room for the newest.

    Gradients lie in a ring; their products with each other, ``G Gᵀ``, are renewed one row at a time.

    Args:
        window: M, at least 1.
        parameters: P, at least 1.
        damping: positive.
        dtype: of gradients and products.
        device: of gradients and products.

    Law:
        Exact for the gradients in the window, of which there are fewer than M at the start: the mean is over those.
        Cost: ``M P`` multiplications to push a gradient, ``2 M P`` a product, and ``M³ / 3`` for the first one after a
        push; memory M P.

    Raises:
        BudgetError: if `window` or `parameters` is no positive whole number.
        SingularCurvatureError: if the damping is not positive.

    Example:
        >>> inverse = SlidingInverseFisher(2, 2, damping=1.0)
        >>> for gradient in torch.tensor([[7.0, 7.0], [2.0, 0.0], [2.0, 0.0]]):
        ...     inverse.push(gradient)
        >>> inverse @ torch.tensor([5.0, 1.0])
        tensor([1., 1.])

    References:
        Frantar, Kurtic and Alistarh, "M-FAC" (arXiv:2107.03430), dynamic version.
    """

    def __init__(
        self,
        window: int,
        parameters: int,
        *,
        damping: float,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_count("window", window)
        check_count("parameters", parameters)
        self._damping = _check_positive(damping)
        self._gradients_NP = torch.zeros(window, parameters, dtype=dtype, device=device)
        self._gram_NN = torch.zeros(window, window, dtype=dtype, device=device)
        self._pushed = 0
        self._factor_NN: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """P, twice."""
        return self._gradients_NP.shape[1], self._gradients_NP.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The gradients' dtype."""
        return self._gradients_NP.dtype

    @property
    def device(self) -> torch.device:
        """The gradients' device."""
        return self._gradients_NP.device

    @property
    def count(self) -> int:
        """How many gradients are in the window."""
        return min(self._pushed, len(self._gradients_NP))

    def push(self, gradient: Tensor) -> None:
        """Take in a gradient ``[P]``, in place of the oldest one if the window is full.

        Args:
            gradient: of the operator's dtype, on its device.

        Raises:
            ShapeError: if it does not fit.
            NonFiniteCurvatureError: if it is not finite; the window stays as it was.
        """
        self._check_operand(gradient)
        if gradient.ndim != 1:
            raise ShapeError(f"push takes one gradient [{self.shape[0]}], but got the shape {tuple(gradient.shape)}")
        _check_finite(gradient)
        place = self._pushed % len(self._gradients_NP)
        with torch.no_grad():
            self._gradients_NP[place] = gradient
            row = self._gradients_NP @ gradient
            self._gram_NN[place] = row
            self._gram_NN[:, place] = row
        self._pushed += 1
        self._factor_NN = None

    def _multiply(self, columns_PR: Tensor) -> Tensor:
        if self._pushed == 0:
            raise BudgetError("the window is empty, so there is no Fisher matrix to invert; push a gradient first")
        rows_NP = self._gradients_NP[: self.count]
        inner_NR = torch.cholesky_solve(rows_NP @ columns_PR, self._factorise())
        return (columns_PR - rows_NP.T @ inner_NR) / self._damping

    def _factorise(self) -> Tensor:
        factor_NN = self._factor_NN
        if factor_NN is None:
            system_NN = self._gram_NN[: self.count, : self.count].clone()
            system_NN.diagonal().add_(self.count * self._damping)
            factor_NN = torch.linalg.cholesky(system_NN)
            self._factor_NN = factor_NN
        return factor_NN


def _check_positive(damping: float) -> float:
    if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 < damping < float("inf"):
        raise SingularCurvatureError(
            f"damping must be positive, because fewer gradients than parameters leave the Fisher matrix singular, but "
            f"got {damping!r}; use e.g. damping=1e-4"
        )
    return float(damping)


def _check_finite(gradients: Tensor) -> None:
    if not torch.isfinite(gradients).all():
        raise NonFiniteCurvatureError(
            f"{int((~torch.isfinite(gradients)).sum())} entries of the gradients are not finite; skip that step, or "
            "look at the loss"
        )
