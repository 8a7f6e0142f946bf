"""Squared norms of the examples' own weight gradients, from the factors that a backward pass multiplies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Up to so many rows an example's Gram matrices are cheaper than random projections.
_MOST_GRAM_ROWS = 16
# Random projections of one product: those of each example, and those of a sum over all examples.
_EXAMPLE_PROBES, _SUM_PROBES = 4, 8


@dataclass(frozen=True)
class Factors:
    """The two factors of a weight's gradient ``G.T X`` on some rows, and whose rows they are.

    Attributes:
        grad_KO: rows of the cotangent, in at least single precision.
        stored_KI: rows of the input, the same.
        place_K: which of the measured examples a row belongs to.
        row_K: which of that example's rows it is.
        examples: how many examples are measured.
        rows: how many rows each has, drawn or not.
        is_once: no row is there twice.
    """

    grad_KO: Tensor
    stored_KI: Tensor
    place_K: Tensor
    row_K: Tensor
    examples: int
    rows: int
    is_once: bool = True

    def row_squares(self) -> Tensor:
        """Return ``‖g_n‖² ‖x_n‖²``, shape ``[K]``, float64."""
        return (self.grad_KO.square().sum(1) * self.stored_KI.square().sum(1)).double()

    def example_squares(self, generator: torch.Generator, weight_K: Tensor | None = None) -> Tensor:
        """Return ``‖Σ_n w_n g_n x_n.T‖²`` for each example, or an unbiased estimate where that is far cheaper."""
        grad_KO = self.grad_KO if weight_K is None else self.grad_KO * weight_K.to(self.grad_KO.dtype).unsqueeze(1)
        if self.rows == 1 and self.is_once:
            squares_K = (grad_KO.square().sum(1) * self.stored_KI.square().sum(1)).double()
            return squares_K.new_zeros(self.examples).index_add_(0, self.place_K, squares_K)
        if self.rows <= _MOST_GRAM_ROWS:
            return self._gram_squares(grad_KO)
        return self._probed_squares(grad_KO, generator)

    def _gram_squares(self, grad_KO: Tensor) -> Tensor:
        target = self.place_K * self.rows + self.row_K
        count = self.examples * self.rows
        grad = grad_KO.new_zeros(count, grad_KO.shape[1]).index_add_(0, target, grad_KO)
        # A row that is drawn twice has its weight twice, and is stored once.
        stored = self.stored_KI.new_zeros(count, self.stored_KI.shape[1]).index_copy_(0, target, self.stored_KI)
        grad_BTO, stored_BTI = (part.view(self.examples, self.rows, -1) for part in (grad, stored))
        return ((grad_BTO @ grad_BTO.mT) * (stored_BTI @ stored_BTI.mT)).double().sum((1, 2))

    def _probed_squares(self, grad_KO: Tensor, generator: torch.Generator) -> Tensor:
        """Return ``‖A_b V‖² / r`` with r columns of random signs, the same for all examples."""
        wide, narrow = (
            (grad_KO, self.stored_KI)
            if grad_KO.shape[1] >= self.stored_KI.shape[1]
            else (
                self.stored_KI,
                grad_KO,
            )
        )
        projected_KR = wide @ _draw_signs(wide, _EXAMPLE_PROBES, generator)
        total = torch.zeros(self.examples, dtype=torch.float64, device=wide.device)
        for column in projected_KR.unbind(1):
            sums = narrow.new_zeros(self.examples, narrow.shape[1])
            sums.index_add_(0, self.place_K, narrow * column.unsqueeze(1))
            total += sums.square().sum(1).double()
        return total / projected_KR.shape[1]

    def square_of_sum(self, generator: torch.Generator, weight_K: Tensor | None = None) -> Tensor:
        """Return an unbiased estimate of ``‖Σ_n w_n g_n x_n.T‖²`` over all rows, by random signs."""
        projected_KR = self.grad_KO @ _draw_signs(self.grad_KO, _SUM_PROBES, generator)
        if weight_K is not None:
            projected_KR = projected_KR * weight_K.to(projected_KR.dtype).unsqueeze(1)
        return (projected_KR.mT @ self.stored_KI).double().square().sum() / projected_KR.shape[1]


def at_least_single(tensor: Tensor) -> Tensor:
    """Return the tensor in single precision, unless it has more."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _draw_signs(like: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, (like.shape[1], columns), generator=generator, dtype=torch.int8)
    return (2 * signs - 1).to(like)
