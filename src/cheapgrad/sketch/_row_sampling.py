"""What sampling along the row axis shares, whether an atom is one row or all rows of an example."""

from __future__ import annotations

import abc
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.sketch._sampling import AbstractSampling, orthogonal_sum
from cheapgrad.sketch._strategy import operands_for, stacked, zero
from cheapgrad.sketch.designs._abstract import SquaredNormOfSum
from cheapgrad.sketch.drawn import DrawnRows, StoredRows
from cheapgrad.sketch.law import Law, LayerShape, LayerTensors, Variance, dense_bytes
from cheapgrad.sketch.moment import Moment
from cheapgrad.sketch.operands import Operands
from cheapgrad.sketch.selection import Selection

_INDEX_BYTES = 8


@dataclass(frozen=True, repr=False)
class AbstractRowSampling(AbstractSampling):
    """Keep a share of the blocks of consecutive rows, weighted to stand for all."""

    @abc.abstractmethod
    def block_length(self, rows: int, examples: int) -> int:
        """Return how many consecutive rows make one atom."""

    def _law(self, estimates: str, formula: str) -> Law:
        return Law(
            estimates=estimates,
            bias=0.0,
            formula=formula,
            fails_when="cross terms of dW are approximated for fixed-size designs with unequal probabilities and n > 8",
            moments=(Moment.COTANGENT, Moment.STORED),
            _variance=self._variance,
            _flops=self._flops,
            _saved_bytes=self._saved_bytes,
        )

    def _block_scores(self, operands: Operands, rows: int) -> tuple[Tensor, int]:
        scores = self.evaluate_scores(operands)
        block = self.block_length(rows, operands.examples)
        return (scores if block == 1 else torch.linalg.vector_norm(scores.view(-1, block), dim=1)), block

    def _select_blocks(self, operands: Operands, rows: int) -> tuple[Selection, int]:
        scores, block = self._block_scores(operands, rows)
        return self.design.draw(scores, self.kept_count(scores.shape[-1])), block

    def select(self, operands: Operands, rows: int) -> Selection:
        """Draw the rows to keep."""
        selection, block = self._select_blocks(operands, rows)
        return selection if block == 1 else selection.expand_blocks(block)

    def draw(self, operands: Operands, memory: Any = None) -> DrawnRows:
        """Draw rows of the cotangent."""
        cotangent_NO = operands.cotangent()
        return DrawnRows(self.select(operands, cotangent_NO.shape[0]), cotangent_NO, operands.weight_OI)

    def store(self, operands: Operands, memory: Any = None) -> tuple[Tensor, ...]:
        """Keep the drawn rows of X, weighted, and the indices of their blocks."""
        matrix_NI = operands.stored_dense()
        if memory is not None:
            predicted_N = memory.predict(matrix_NI.shape[0], operands.examples, matrix_NI.device)
            operands = dataclasses.replace(operands, predicted_norm_N=predicted_N)
        blocks, block = self._select_blocks(operands, matrix_NI.shape[0])
        selection = blocks if block == 1 else blocks.expand_blocks(block)
        return selection.apply(matrix_NI, 0), blocks.index_K

    def restore(self, kept: tuple[Tensor, ...], rows: int, inputs: int, dtype: torch.dtype) -> StoredRows:
        """Return the kept rows as a stand-in for X."""
        sketched_KI, index_B = kept
        block = sketched_KI.shape[0] // max(index_B.shape[0], 1)
        # The weights are in the kept rows already.
        selection = Selection(index_B, torch.ones_like(index_B), rows // max(block, 1), may_repeat=True)
        return StoredRows(selection if block <= 1 else selection.expand_blocks(block), sketched_KI)

    def _variance(self, tensors: LayerTensors, moment: Moment) -> Variance:
        stored_QNI, cotangent_QNO = stacked(tensors)
        operands = operands_for(tensors, moment)
        scores, block = self._block_scores(operands, stored_QNI.shape[1])
        count = self.kept_count(scores.shape[-1])
        squared_norms, squared_norm_of_sum = _weight_atoms(stored_QNI, cotangent_QNO, block)
        weight = self.design.variance(squared_norms, scores, count, squared_norm_of_sum)
        if operands.weight_OI is None:
            return Variance(zero(scores), weight)
        row_norms_N = (operands.cotangent() @ operands.weight_OI).square().sum(1)
        return Variance(self.input_variance(row_norms_N.view(-1, block).sum(1), scores, count), weight)

    def input_variance(self, squared_norms: Tensor, scores: Tensor, count: int) -> Tensor:
        """Return the variance of dX, whose atoms lie in different rows and are orthogonal."""
        return self.design.variance(squared_norms, scores, count, orthogonal_sum(squared_norms))

    def _kept_blocks(self, shape: LayerShape) -> tuple[float, int]:
        """Return how many blocks are kept, and how many rows each has."""
        block = self.block_length(shape.rows, shape.examples)
        blocks = shape.rows // block
        return self.design.expected_count(blocks, self.kept_count(blocks)), block

    def _flops(self, shape: LayerShape, moment: Moment) -> float:
        blocks, block = self._kept_blocks(shape)
        kept = blocks * block
        rows_for_input = kept if moment is Moment.COTANGENT else shape.rows
        return 2.0 * (rows_for_input + kept) * shape.inputs * shape.outputs

    def _saved_bytes(self, shape: LayerShape, moment: Moment) -> float:
        if moment is Moment.COTANGENT:
            return dense_bytes(shape)
        blocks, block = self._kept_blocks(shape)
        return blocks * (block * shape.inputs * shape.element_bytes + _INDEX_BYTES)


def _weight_atoms(stored_QNI: Tensor, cotangent_QNO: Tensor, block: int) -> tuple[Tensor, SquaredNormOfSum]:
    """Return squared norms and sums of the atoms of dW: ``sum_{n in block} g_n x_n.T``, over all groups."""
    groups, rows = stored_QNI.shape[:2]
    blocks = rows // block
    stored = stored_QNI.reshape(groups, blocks, block, -1)
    cotangent = cotangent_QNO.reshape(groups, blocks, block, -1)
    # ||G_b.T X_b||**2 through the two small Gram matrices, so that no [O, I] matrix per block is formed.
    squared_norms = ((stored @ stored.mT) * (cotangent @ cotangent.mT)).sum((0, 2, 3))

    def squared_norm_of_sum(weights: Tensor) -> Tensor:
        weights_N = weights.repeat_interleave(block).view(1, -1, 1)
        return ((cotangent_QNO * weights_N).mT @ stored_QNI).square().sum()

    return squared_norms, squared_norm_of_sum
