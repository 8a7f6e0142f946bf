"""Unbiased approximation of bounded rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.errors import BudgetError, PlacementError, check_count
from cheapgrad.sketch._strategy import AbstractStrategy, flat, operands_for, stacked, zero
from cheapgrad.sketch.designs import AbstractDesign, Systematic
from cheapgrad.sketch.drawn import DrawnFactors, StoredFactors, one_hot_rows
from cheapgrad.sketch.law import Law, LayerShape, LayerTensors, Variance, dense_bytes
from cheapgrad.sketch.moment import Moment
from cheapgrad.sketch.operands import Operands, norm_along
from cheapgrad.sketch.range_basis import RangeBasis, find_range


@dataclass(frozen=True, repr=False)
class LowRank(AbstractStrategy):
    r"""Replace X (stored) or G (cotangent) by a random matrix of rank at most R whose expectation it is.

    With ``refresh=None``: the optimal sketch. The singular values are water-filled, ``p_r = min(1, lambda sigma_r)``,
    and a sample of R components is kept with weights ``1 / p_r``. It costs an SVD per step.

    With ``refresh=s``: the first ``R // 2`` directions B come from a randomised range finder and are renewed every s
    steps; ``M = M B B.T + (M - M B B.T)`` and the columns of the second part are sampled afresh in every step, so the
    estimate is unbiased in every single step for whatever B is, however old.

    Args:
        rank: R, at least 1 and at most the smaller side of the matrix.
        refresh: steps between renewals of the basis, at least 1; None for the exact singular value decomposition.
        design: how components (or columns) are sampled; a fixed-size design keeps the rank at most R.

    **Law** Bias 0. ``E ||M_hat - M||**2 = (sum_tail sigma)**2 / (R - m) - sum_tail sigma**2``, the least possible; for
    products ``Var = sum_r (1/p_r - 1) sigma_r**2 ||L(u_r v_r.T)||**2`` plus cross terms. The lazy form puts the
    residual's columns in the place of the components.

    Raises:
        BudgetError: if `rank` or `refresh` is not a whole number of at least 1, or `rank` exceeds the layer.

    >>> LowRank(rank=4).law.bias
    0.0

    References:
        arXiv:2505.09647 (minimum distortion), arXiv:1902.03993; lazy bases with random completion, arXiv:2602.23111,
        which keeps its random part for hundreds of steps; ours is fresh in every step.
    """

    rank: int
    refresh: int | None = None
    design: AbstractDesign = Systematic()

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        if self.refresh is not None:
            check_count("refresh", self.refresh)
        if self.refresh is not None and self.rank < 2:
            raise BudgetError(f"rank must be at least 2 with refresh (a basis and a sample), but got {self.rank}")
        if not isinstance(self.design, AbstractDesign):
            raise PlacementError(f"design must be a sampling design such as Systematic(), but got {self.design!r}")

    @property
    def law(self) -> Law:
        """Bias, variance and cost."""
        return Law(
            estimates="the cotangent, or what is stored of X, by a random matrix of bounded rank",
            bias=0.0,
            formula="‖M̂ − M‖²: (Σ_tail σ)²/(R − m) − Σ_tail σ²",
            fails_when="refresh: the law holds given the basis, which is itself estimated from the data",
            moments=(Moment.STORED, Moment.COTANGENT),
            _variance=self._variance,
            _flops=self._flops,
            _saved_bytes=self._saved_bytes,
        )

    def check_layer(self, inputs: int, outputs: int, moment: Moment) -> None:
        """Refuse a rank larger than the matrix."""
        width, side = (inputs, "input") if moment is Moment.STORED else (outputs, "output")
        if self.rank > width:
            raise BudgetError(
                f"rank={self.rank} is larger than the layer's {width} {side} features; use a rank in [1, {width}]"
            )

    def new_memory(self) -> RangeBasis | None:
        """Return the place for a lazily refreshed basis."""
        return RangeBasis(self.refresh) if self.refresh is not None else None

    def _factors(self, matrix_ND: Tensor, memory: RangeBasis | None) -> tuple[Tensor, Tensor]:
        """Return ``left [N, R]`` and ``right [R, D]`` with ``E[left @ right] = matrix``."""
        if self.refresh is None:
            left_NR, scores, right_RD = _decompose(matrix_ND)
            selection = self.design.draw(scores, min(self.rank, scores.shape[0]))
            return selection.apply(left_NR * scores.to(left_NR.dtype), 1), selection.gather(right_RD, 0)
        basis_DR = _basis(matrix_ND, self.rank // 2, memory)
        inside_NR = matrix_ND @ basis_DR
        residual_ND = matrix_ND - inside_NR @ basis_DR.mT
        count = self.rank - basis_DR.shape[1]
        selection = self.design.draw(norm_along(residual_ND, 0), count)
        ones_KD = one_hot_rows(
            selection.index_K, torch.ones_like(selection.weight_K), matrix_ND.shape[1], matrix_ND.dtype
        )
        return torch.cat([inside_NR, selection.apply(residual_ND, 1)], 1), torch.cat([basis_DR.mT, ones_KD], 0)

    def draw(self, operands: Operands, memory: Any = None) -> DrawnFactors:
        """Draw the factors of the cotangent."""
        return DrawnFactors(*self._factors(operands.cotangent(), memory))

    def store(self, operands: Operands, memory: Any = None) -> tuple[Tensor, ...]:
        """Keep the factors of X."""
        return self._factors(operands.stored_dense(), memory)

    def restore(self, kept: tuple[Tensor, ...], rows: int, inputs: int, dtype: torch.dtype) -> StoredFactors:
        """Return the factors as a stand-in for X."""
        return StoredFactors(kept[0], kept[1])

    def _components(self, matrix_ND: Tensor, basis_DR: Tensor | None) -> tuple[Tensor, Tensor, Tensor, int]:
        """Return ``left [N, R']``, ``right [R', D]``, scores and sampled count; atoms are ``left_:r right_r``."""
        if self.refresh is None:
            left_NR, scores, right_RD = _decompose(matrix_ND)
            return left_NR * scores, right_RD, scores, min(self.rank, scores.shape[0])
        basis_DR = find_range(matrix_ND, self.rank // 2) if basis_DR is None else basis_DR.double()
        residual_ND = matrix_ND - matrix_ND @ basis_DR @ basis_DR.mT
        identity_DD = torch.eye(matrix_ND.shape[1], dtype=matrix_ND.dtype, device=matrix_ND.device)
        return residual_ND, identity_DD, norm_along(residual_ND, 0), self.rank - basis_DR.shape[1]

    def _variance(self, tensors: LayerTensors, moment: Moment) -> Variance:
        return self.variance_given_basis(tensors, moment, None)

    def variance_with_memory(self, tensors: LayerTensors, moment: Moment, memory: RangeBasis | None) -> Variance:
        """Return the law for the basis that the memory holds."""
        return self.variance_given_basis(tensors, moment, memory.held_DR if memory is not None else None)

    def variance_given_basis(self, tensors: LayerTensors, moment: Moment, basis_DR: Tensor | None) -> Variance:
        """Return the law for a held basis ``[D, R // 2]``; None finds a fresh one (without refresh there is none)."""
        stored_QNI, cotangent_QNO = stacked(tensors)
        operands = operands_for(tensors, moment)
        sketched = flat(stored_QNI) if moment is Moment.STORED else operands.cotangent()
        partner_QND = cotangent_QNO if moment is Moment.STORED else stored_QNI
        left_NR, right_RD, scores, count = self._components(sketched, basis_DR)
        # Products with the partner, per group: [Q, O, R'] and [Q, R', D / Q].
        inner_QOR = partner_QND.mT @ left_NR
        right_QRD = right_RD.view(right_RD.shape[0], partner_QND.shape[0], -1).transpose(0, 1)
        norms = (inner_QOR.square().sum(1) * right_QRD.square().sum(2)).sum(0)

        def weight_sum(weights: Tensor) -> Tensor:
            return ((inner_QOR * weights) @ right_QRD).square().sum()

        weight = self.design.variance(norms, scores, count, weight_sum)
        if operands.weight_OI is None:
            return Variance(zero(weight), weight)
        outer_RI = right_RD @ operands.weight_OI
        input_norms = left_NR.square().sum(0) * outer_RI.square().sum(1)

        def input_sum(weights: Tensor) -> Tensor:
            return ((left_NR * weights) @ outer_RI).square().sum()

        return Variance(self.design.variance(input_norms, scores, count, input_sum), weight)

    def _flops(self, shape: LayerShape, moment: Moment) -> float:
        # The factorisation itself is not a matrix product and is not counted for refresh=None.
        if moment is Moment.STORED:
            exact_input = 2.0 * shape.rows * shape.inputs * shape.outputs
            return exact_input + 2.0 * self.rank * shape.outputs * (shape.rows + shape.inputs)
        return 4.0 * self.rank * (shape.outputs * shape.inputs + shape.rows * shape.inputs)

    def _saved_bytes(self, shape: LayerShape, moment: Moment) -> float:
        if moment is Moment.COTANGENT:
            return dense_bytes(shape)
        rank = min(self.rank, shape.rows)
        return float(rank * (shape.rows + shape.inputs) * shape.element_bytes)


def _decompose(matrix_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return left vectors, singular values (float64) and right vectors; NaN throughout if the matrix is not finite."""
    dtype = torch.promote_types(matrix_ND.dtype, torch.float32)
    # The decomposition raises on NaN; a poisoned scale lets it run and carries the NaN to the result.
    poison = (matrix_ND * 0).sum()
    clean = torch.nan_to_num(matrix_ND.to(dtype), nan=0.0, posinf=0.0, neginf=0.0)
    left, values, right = torch.linalg.svd(clean, full_matrices=False)
    # In the first value too, which then is certain to be kept: a sample of random size may be empty otherwise.
    values = torch.cat([values[:1] + poison, values[1:]])
    return (left + poison).to(matrix_ND.dtype), values.double(), right.to(matrix_ND.dtype)


def _basis(matrix_ND: Tensor, count: int, memory: RangeBasis | None) -> Tensor:
    return find_range(matrix_ND, count) if memory is None else memory.basis_for(matrix_ND, count)
