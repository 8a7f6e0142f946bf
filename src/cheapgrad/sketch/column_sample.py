"""Sampling output features (columns of the cotangent)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from cheapgrad.errors import PlacementError
from cheapgrad.sketch._sampling import AbstractSampling, orthogonal_sum
from cheapgrad.sketch._strategy import operands_for, stacked, zero
from cheapgrad.sketch.drawn import DrawnColumns
from cheapgrad.sketch.law import Law, LayerShape, LayerTensors, Variance, dense_bytes
from cheapgrad.sketch.moment import Moment
from cheapgrad.sketch.operands import Operands
from cheapgrad.sketch.scores import StoredNorm
from cheapgrad.sketch.selection import Selection


@dataclass(frozen=True, repr=False)
class ColumnSample(AbstractSampling):
    r"""Keep a share of the output features of the cotangent, weighted to stand for all.

    ``dX = sum_kept G_:j W_j / p_j`` and ``dW_j = G_:j.T X / p_j`` for kept j, zero for the others.

    Args:
        keep: share of output features kept, in (0, 1].
        scores: None takes ``CotangentNorm()``; ``ColumnNorm()`` is best for dX alone, ``JointNorm()`` for both.
        design: fixed size with exact inclusion probabilities by default.

    **Law** Bias 0. ``Var dX = sum_ij (p_ij / (p_i p_j) - 1) <G_:i, G_:j> <W_i, W_j>``;
    ``Var dW = sum_j (1/p_j - 1) ||G_:j.T X||**2``. Products cost ``4 N I K``.

    Raises:
        BudgetError: if `keep` is not in (0, 1].
        PlacementError: if the scores do not score output features.

    >>> ColumnSample(keep=0.5).kept_count(10)
    5

    References:
        Data-dependent diagonal sketches of the cotangent, arXiv:2602.14701; sampled column-row products, SIAM J.
        Comput. 36 (2006).
    """

    axis: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.scores, StoredNorm):
            raise PlacementError(
                f"{self.scores!r} scores input features, but {type(self).__name__} samples output features; "
                "use CotangentNorm(), ColumnNorm() or JointNorm()"
            )

    @property
    def law(self) -> Law:
        """Bias, variance and cost."""
        return Law(
            estimates="output features of the cotangent",
            bias=0.0,
            formula="dX: Σᵢⱼ(pᵢⱼ/(pᵢpⱼ) − 1)⟨G:ᵢ,G:ⱼ⟩⟨Wᵢ,Wⱼ⟩;  dW: Σ(1/pⱼ − 1)‖G:ⱼᵀX‖²",
            fails_when="cross terms of dX are approximated for fixed-size designs with unequal probabilities and n > 8",
            moments=(Moment.COTANGENT,),
            _variance=self._variance,
            _flops=self._flops,
            _saved_bytes=lambda shape, moment: dense_bytes(shape),
        )

    @property
    def misplacement_reason(self) -> str:
        """Why it cannot be stored."""
        return "it samples output features, and what is stored of X has none"

    def select(self, operands: Operands) -> Selection:
        """Draw the columns to keep."""
        scores = self.evaluate_scores(operands)
        return self.design.draw(scores, self.kept_count(scores.shape[-1]))

    def draw(self, operands: Operands, memory: Any = None) -> DrawnColumns:
        """Draw columns of the cotangent."""
        return DrawnColumns(self.select(operands), operands.cotangent())

    def _variance(self, tensors: LayerTensors, moment: Moment) -> Variance:
        stored_QNI, cotangent_QNO = stacked(tensors)
        operands = operands_for(tensors, moment)
        scores = self.evaluate_scores(operands)
        count = self.kept_count(scores.shape[-1])
        weight_rows = (cotangent_QNO.mT @ stored_QNI).square().sum(-1).flatten()
        weight = self.design.variance(weight_rows, scores, count, orthogonal_sum(weight_rows))
        if operands.weight_OI is None:
            return Variance(zero(scores), weight)
        cotangent_NO, weight_OI = operands.cotangent(), operands.weight_OI
        squared_norms_O = cotangent_NO.square().sum(0) * weight_OI.square().sum(1)

        def squared_norm_of_sum(weights_O: Tensor) -> Tensor:
            return ((cotangent_NO * weights_O) @ weight_OI).square().sum()

        return Variance(self.design.variance(squared_norms_O, scores, count, squared_norm_of_sum), weight)

    def _flops(self, shape: LayerShape, moment: Moment) -> float:
        kept = self.design.expected_count(shape.outputs, self.kept_count(shape.outputs))
        return 4.0 * shape.rows * shape.inputs * kept
