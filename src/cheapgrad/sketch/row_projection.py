"""Random projections of the row axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.errors import PlacementError, check_fraction
from cheapgrad.sketch._strategy import AbstractStrategy, operands_for, stacked, zero
from cheapgrad.sketch.budget import count_kept
from cheapgrad.sketch.drawn import DrawnRows, StoredRows
from cheapgrad.sketch.law import Law, LayerShape, LayerTensors, Variance, dense_bytes
from cheapgrad.sketch.moment import Moment
from cheapgrad.sketch.operands import Operands
from cheapgrad.sketch.projections import AbstractProjection, Rademacher
from cheapgrad.sketch.projections._abstract import Moments


@dataclass(frozen=True, repr=False)
class RowProjection(AbstractStrategy):
    r"""Replace the N rows by K random combinations of them.

    Stored: ``S X`` is kept, ``dW = (S G).T (S X)``, dX exact. As cotangent: ``dX = S.T ((S G) W)`` as well. Oblivious
        to the
    data: score-based `RowSample` is never worse in dW than a Gaussian projection at equal K, and costs a gather
        instead of a product. For comparison, and for data so coherent that any sample misses it.

    Args:
        keep: K / N, in (0, 1].
        kind: `Rademacher`, `Gaussian`, `Hadamard` or `CountSketch`.

    **Law** Bias 0; variances of the kind. For `Rademacher`
    ``Var dW = (||X||**2 ||G||**2 + ||G.T X||**2 - 2 sum_n ||x_n||**2 ||g_n||**2) / K``.

    Raises:
        BudgetError: if `keep` is not in (0, 1].

    >>> RowProjection(keep=0.25).kind
    Rademacher()

    References:
        arXiv:2201.13195 (memory-efficient backpropagation through large linear layers).
    """

    keep: float
    kind: AbstractProjection = Rademacher()

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", check_fraction("keep", self.keep))
        if not isinstance(self.kind, AbstractProjection):
            raise PlacementError(
                f"kind must be Rademacher(), Gaussian(), Hadamard() or CountSketch(), but got {self.kind!r}"
            )

    @property
    def is_exact(self) -> bool:
        """Whether nothing is projected."""
        return self.keep == 1.0

    @property
    def law(self) -> Law:
        """Bias, variance and cost."""
        return Law(
            estimates="random combinations of the rows of the cotangent, or of what is stored of X",
            bias=0.0,
            formula="Rademacher dW: (‖X‖²‖G‖² + ‖GᵀX‖² − 2Σ‖xₙ‖²‖gₙ‖²)/K, dX: (N − 1)/K ‖dX‖²; see the kinds",
            fails_when="never",
            moments=(Moment.STORED, Moment.COTANGENT),
            _variance=self._variance,
            _flops=self._flops,
            _saved_bytes=self._saved_bytes,
        )

    def kept_count(self, rows: int) -> int:
        """Return K: the nearest whole number to ``keep * N``, at least one."""
        return count_kept(self.keep, rows)

    def draw(self, operands: Operands, memory: Any = None) -> DrawnRows:
        """Project the cotangent."""
        cotangent_NO = operands.cotangent()
        rows = cotangent_NO.shape[0]
        return DrawnRows(self.kind.draw(cotangent_NO, rows, self.kept_count(rows)), cotangent_NO)

    def store(self, operands: Operands, memory: Any = None) -> tuple[Tensor, ...]:
        """Keep ``S X`` and what is needed to apply S again."""
        matrix_NI = operands.stored_dense()
        projection = self.kind.draw(matrix_NI, matrix_NI.shape[0], self.kept_count(matrix_NI.shape[0]))
        return projection.apply(matrix_NI), *projection.tensors()

    def restore(self, kept: tuple[Tensor, ...], rows: int, inputs: int, dtype: torch.dtype) -> StoredRows:
        """Return the projection as a stand-in for X."""
        projection = self.kind.rebuild(kept[1:], rows, self.kept_count(rows), kept[0])
        return StoredRows(projection, kept[0])

    def _variance(self, tensors: LayerTensors, moment: Moment) -> Variance:
        stored_QNI, cotangent_QNO = stacked(tensors)
        rows = stored_QNI.shape[1]
        count = self.kept_count(rows)
        weight = zero(stored_QNI)
        for stored_NI, cotangent_NO in zip(stored_QNI, cotangent_QNO, strict=True):
            moments = Moments(
                product=stored_NI.square().sum() * cotangent_NO.square().sum(),
                rows=(stored_NI.square().sum(1) * cotangent_NO.square().sum(1)).sum(),
                gradient=(cotangent_NO.mT @ stored_NI).square().sum(),
            )
            weight = weight + self.kind.weight_variance(moments, rows, count)
        operands = operands_for(tensors, moment)
        if operands.weight_OI is None:
            return Variance(zero(weight), weight)
        exact = torch.matmul(operands.cotangent(), operands.weight_OI).square().sum()
        return Variance(self.kind.input_factor(rows, count) * exact, weight)

    def _flops(self, shape: LayerShape, moment: Moment) -> float:
        kept = self.kept_count(shape.rows)
        sides = shape.inputs + shape.outputs
        if moment is Moment.COTANGENT:
            # S G and S X, the two products, and S.T applied to [K, I].
            sketching = self.kind.flops(shape.rows, kept, sides + shape.inputs)
            return 4.0 * kept * shape.inputs * shape.outputs + sketching
        products = 2.0 * (shape.rows + kept) * shape.inputs * shape.outputs
        return products + self.kind.flops(shape.rows, kept, sides)

    def _saved_bytes(self, shape: LayerShape, moment: Moment) -> float:
        if moment is Moment.COTANGENT:
            return dense_bytes(shape)
        kept = self.kept_count(shape.rows)
        return float(kept * shape.inputs * shape.element_bytes) + self.kind.saved_bytes(shape.rows, kept)
