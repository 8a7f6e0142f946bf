"""Masks over single entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.errors import PlacementError, check_fraction
from cheapgrad.sketch import random
from cheapgrad.sketch._strategy import AbstractStrategy, flat, operands_for, stacked, zero
from cheapgrad.sketch.budget import count_kept
from cheapgrad.sketch.designs import Systematic
from cheapgrad.sketch.drawn import DrawnDense, StoredDense
from cheapgrad.sketch.law import Law, LayerShape, LayerTensors, Variance, dense_bytes, dense_flops
from cheapgrad.sketch.moment import Moment
from cheapgrad.sketch.operands import Operands
from cheapgrad.sketch.water_filling import water_filling

_INDEX_BYTES = 8


@dataclass(frozen=True, repr=False)
class ElementMask(AbstractStrategy):
    r"""Keep a share of the single entries of the cotangent, or of what is stored of X.

    ``p_e = min(1, lambda |entry|)``, or equal probabilities with ``by_magnitude=False``. A cotangent is masked by
    independent coins and stays dense, so no time is saved; what is stored keeps a fixed number of entries and their
    indices. Here to complete the comparison: lowest variance at equal density, no dense speed-up.

    Args:
        keep: share of entries kept, in (0, 1].
        by_magnitude: scores ``|entry|`` if true, equal scores otherwise.

    **Law** Bias 0. Cotangent: ``Var dX = sum_nj (1/p_nj - 1) g_nj**2 ||W_j||**2``,
    ``Var dW = sum_nj (1/p_nj - 1) g_nj**2 ||x_n||**2`` exactly. Stored:
    ``Var dW = sum_ni (1/p_ni - 1) x_ni**2 ||g_n||**2`` up to
    the (negative) correlation of a fixed-size sample of ``N I`` entries.

    Raises:
        BudgetError: if `keep` is not in (0, 1].

    >>> ElementMask(keep=0.5).law.bias
    0.0

    References:
        Per-element masks of the vector-Jacobian product, arXiv:2602.14701.
    """

    keep: float
    by_magnitude: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", check_fraction("keep", self.keep))
        if not isinstance(self.by_magnitude, bool):
            raise PlacementError(f"by_magnitude must be True or False, but got {self.by_magnitude!r}")

    @property
    def is_exact(self) -> bool:
        """Whether everything is kept."""
        return self.keep == 1.0

    @property
    def law(self) -> Law:
        """Bias, variance and cost."""
        return Law(
            estimates="single entries of the cotangent, or of what is stored of X",
            bias=0.0,
            formula="cotangent dX: Σ(1/pₙⱼ − 1)gₙⱼ²‖Wⱼ‖², dW: Σ(1/pₙⱼ − 1)gₙⱼ²‖xₙ‖²;  stored dW: Σ(1/pₙᵢ − 1)xₙᵢ²‖gₙ‖²",
            fails_when="stored: the correlation of a fixed-size sample of N·I entries is neglected",
            moments=(Moment.COTANGENT, Moment.STORED),
            _variance=self._variance,
            _flops=lambda shape, moment: dense_flops(shape),
            _saved_bytes=self._saved_bytes,
        )

    def _kept_count(self, size: int) -> int:
        return count_kept(self.keep, size)

    def _scores(self, matrix: Tensor) -> Tensor:
        # Without magnitudes an entry that is not finite counts as infinite all the same, so that it is never dropped.
        scores = matrix.abs() if self.by_magnitude else torch.where(torch.isfinite(matrix), 1.0, torch.inf)
        return scores.flatten()

    def draw(self, operands: Operands, memory: Any = None) -> DrawnDense:
        """Flip a coin per entry of the cotangent."""
        cotangent_NO = operands.cotangent()
        scores = self._scores(cotangent_NO)
        probabilities = water_filling(scores, self._kept_count(scores.shape[0])).view(cotangent_NO.shape)
        kept = random.uniform(cotangent_NO, probabilities.shape) < probabilities
        weight = torch.where(kept, 1.0 / torch.where(kept, probabilities, 1.0), 0.0)
        return DrawnDense(cotangent_NO * weight.to(cotangent_NO.dtype))

    def store(self, operands: Operands, memory: Any = None) -> tuple[Tensor, ...]:
        """Keep the drawn entries of X, weighted, and their flat indices."""
        matrix_NI = operands.stored_dense()
        scores = self._scores(matrix_NI)
        selection = Systematic().draw(scores, self._kept_count(scores.shape[0]))
        return selection.apply(matrix_NI.flatten(), 0), selection.index_K

    def restore(self, kept: tuple[Tensor, ...], rows: int, inputs: int, dtype: torch.dtype) -> StoredDense:
        """Return the kept entries as a stand-in for X."""
        values_K, index_K = kept
        return StoredDense(values_K.new_zeros(rows * inputs).scatter(0, index_K, values_K).view(rows, inputs))

    def _variance(self, tensors: LayerTensors, moment: Moment) -> Variance:
        stored_QNI, cotangent_QNO = stacked(tensors)
        if moment is Moment.STORED:
            matrix_NI = flat(stored_QNI)
            noise_QNI = self._entry_variance(matrix_NI).view(matrix_NI.shape[0], *stored_QNI.shape[::2]).transpose(0, 1)
            norms_QN = cotangent_QNO.square().sum(-1)
            return Variance(zero(matrix_NI), (noise_QNI.sum(-1) * norms_QN).sum())
        operands = operands_for(tensors, moment)
        cotangent_NO = operands.cotangent()
        noise_NO = self._entry_variance(cotangent_NO)
        noise_QNO = noise_NO.view(noise_NO.shape[0], *cotangent_QNO.shape[::2]).transpose(0, 1)
        weight = (noise_QNO.sum(-1) * stored_QNI.square().sum(-1)).sum()
        if operands.weight_OI is None:
            return Variance(zero(noise_NO), weight)
        return Variance((noise_NO.sum(0) * operands.weight_OI.square().sum(1)).sum(), weight)

    def _entry_variance(self, matrix: Tensor) -> Tensor:
        """Return ``(1 / p - 1) entry**2``, in the shape of `matrix`."""
        scores = self._scores(matrix)
        probabilities = water_filling(scores, self._kept_count(scores.shape[0])).view(matrix.shape)
        inverse = torch.where(probabilities > 0, 1.0 / probabilities, 1.0)
        return (inverse - 1) * matrix.double() ** 2

    def _saved_bytes(self, shape: LayerShape, moment: Moment) -> float:
        if moment is Moment.COTANGENT:
            return dense_bytes(shape)
        return self._kept_count(shape.rows * shape.inputs) * float(shape.element_bytes + _INDEX_BYTES)
