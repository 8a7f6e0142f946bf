"""Sampling input features of what is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cheapgrad.errors import PlacementError, check_count
from cheapgrad.sketch._sampling import AbstractSampling, orthogonal_sum
from cheapgrad.sketch._strategy import flat, operands_for, stacked, zero
from cheapgrad.sketch.designs import Poisson
from cheapgrad.sketch.drawn import StoredColumns, StoredDense
from cheapgrad.sketch.law import Law, LayerShape, LayerTensors, Variance
from cheapgrad.sketch.moment import Moment
from cheapgrad.sketch.operands import AbstractStoredMatrix, Operands, norm_along
from cheapgrad.sketch.scores import Uniform, equal_scores
from cheapgrad.sketch.selection import Selection

_INDEX_BYTES = 8


@dataclass(frozen=True, repr=False)
class FeatureSample(AbstractSampling):
    r"""Keep a share of the input features of X, with one mask for all rows or one per group of rows.

    Stored at forward time; dX stays exact and ``dW = G.T X_hat``. With one mask the columns of dW that were not kept
    are zero in this step; with a mask per group of rows every column gets its share in every step, at the price of a
    dense product.

    Args:
        keep: share of features kept, in (0, 1].
        scores: None takes ``StoredNorm()``.
        design: a fixed-size design by default.
        rows_per_mask: rows that share a mask; None for one mask for all rows. The last group may be shorter.

    **Law** Bias 0. Groups v of rows: ``Var dW = sum_v sum_i (1/p_vi - 1) ||G_v.T X_v,:i||**2``.

    Raises:
        BudgetError: if `keep` is not in (0, 1] or `rows_per_mask` < 1.
        PlacementError: for several masks with a design of random size.

    >>> FeatureSample(keep=0.5, rows_per_mask=1).masks(rows=4)
    4

    References:
        Randomized automatic differentiation, arXiv:2007.10412 ("same sample" and "different sample").
    """

    rows_per_mask: int | None = None
    axis: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows_per_mask is None:
            return
        check_count("rows_per_mask", self.rows_per_mask)
        if isinstance(self.design, Poisson):
            raise PlacementError(
                f"rows_per_mask={self.rows_per_mask} needs a design of fixed size, but got {self.design!r}; "
                "use Systematic() or Pivotal(), or rows_per_mask=None"
            )

    @property
    def law(self) -> Law:
        """Bias, variance and cost."""
        return Law(
            estimates="input features of what is stored of X",
            bias=0.0,
            formula="dX: 0;  dW: Σᵥ Σᵢ (1/pᵥᵢ − 1)‖GᵥᵀXᵥ,:ᵢ‖²",
            fails_when="never, for designs without replacement: columns of dW are orthogonal",
            moments=(Moment.STORED,),
            _variance=self._variance,
            _flops=self._flops,
            _saved_bytes=self._saved_bytes,
        )

    @property
    def misplacement_reason(self) -> str:
        """Why it cannot sketch a cotangent."""
        return "it samples input features, and the cotangent has none"

    def masks(self, rows: int) -> int:
        """Return how many masks `rows` rows take."""
        return 1 if self.rows_per_mask is None else -(-rows // self.rows_per_mask)

    def _grouped(self, matrix_NI: Tensor) -> Tensor:
        """Return X as ``[groups, rows per mask, I]``, padded with zero rows."""
        per_mask = self.rows_per_mask or matrix_NI.shape[0]
        missing = -matrix_NI.shape[0] % per_mask
        padded = torch.nn.functional.pad(matrix_NI, (0, 0, 0, missing)) if missing else matrix_NI
        return padded.view(-1, per_mask, matrix_NI.shape[1])

    def _group_scores(self, matrix_NI: Tensor) -> Tensor:
        grouped = self._grouped(matrix_NI)
        return equal_scores(grouped, 1) if isinstance(self.scores, Uniform) else norm_along(grouped, 1)

    def store(self, operands: Operands, memory: Any = None) -> tuple[Tensor, ...]:
        """Keep the drawn features of X, weighted, and their indices."""
        matrix_NI = operands.stored_dense()
        count = self.kept_count(matrix_NI.shape[1])
        if self.rows_per_mask is None:
            selection = self.design.draw(self.evaluate_scores(operands), count)
            return selection.apply(matrix_NI, 1), selection.index_K
        selection = self.design.draw(self._group_scores(matrix_NI), count)
        grouped = self._grouped(matrix_NI)
        index = selection.index_K.unsqueeze(1).expand(-1, grouped.shape[1], -1)
        kept = grouped.gather(2, index) * selection.weight_K.unsqueeze(1).to(matrix_NI.dtype)
        return kept.flatten(0, 1)[: matrix_NI.shape[0]].clone(), selection.index_K

    def restore(self, kept: tuple[Tensor, ...], rows: int, inputs: int, dtype: torch.dtype) -> AbstractStoredMatrix:
        """Return the kept features as a stand-in for X."""
        sketched_NK, index_K = kept
        if self.rows_per_mask is None:
            # The weights are in the kept columns already.
            return StoredColumns(Selection(index_K, torch.ones_like(index_K), inputs, may_repeat=True), sketched_NK)
        index_NK = index_K.repeat_interleave(self.rows_per_mask, dim=0)[:rows]
        zeros = sketched_NK.new_zeros(rows, inputs)
        return StoredDense(zeros.scatter_add(1, index_NK, sketched_NK))

    def _variance(self, tensors: LayerTensors, moment: Moment) -> Variance:
        stored_QNI, cotangent_QNO = stacked(tensors)
        matrix_NI = flat(stored_QNI)
        count = self.kept_count(matrix_NI.shape[1])
        if self.rows_per_mask is None:
            group_scores = self.evaluate_scores(operands_for(tensors, moment)).unsqueeze(0)
        else:
            group_scores = self._group_scores(matrix_NI)
        total = zero(matrix_NI)
        per_mask = self.rows_per_mask or matrix_NI.shape[0]
        for group, scores in enumerate(group_scores):
            rows = slice(group * per_mask, (group + 1) * per_mask)
            columns = (cotangent_QNO[:, rows].mT @ stored_QNI[:, rows]).square().sum(1).flatten()
            total = total + self.design.variance(columns, scores, count, orthogonal_sum(columns))
        return Variance(zero(matrix_NI), total)

    def _flops(self, shape: LayerShape, moment: Moment) -> float:
        kept = self.design.expected_count(shape.inputs, self.kept_count(shape.inputs))
        features = kept if self.rows_per_mask is None else shape.inputs
        return 2.0 * shape.rows * shape.outputs * (shape.inputs + features)

    def _saved_bytes(self, shape: LayerShape, moment: Moment) -> float:
        kept = self.design.expected_count(shape.inputs, self.kept_count(shape.inputs))
        return kept * (shape.rows * shape.element_bytes + self.masks(shape.rows) * _INDEX_BYTES)
