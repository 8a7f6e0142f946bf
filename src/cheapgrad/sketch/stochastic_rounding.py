"""Stochastic rounding: a codec whose decoded value has the original as expectation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.errors import BudgetError, check_count
from cheapgrad.sketch._codes import decode_groups, encode_groups, encode_groups_twice, scales_of
from cheapgrad.sketch._strategy import AbstractStrategy, flat, stacked, zero
from cheapgrad.sketch.dither import draw_dither, draw_plane_dither
from cheapgrad.sketch.fusing import work_by_rows
from cheapgrad.sketch.law import Law, LayerShape, LayerTensors, Variance, dense_flops
from cheapgrad.sketch.moment import Moment
from cheapgrad.sketch.operands import AbstractStoredMatrix, Operands

_ALLOWED_BITS = (2, 4, 8)
# Each group keeps its lowest value and its step in bfloat16.
_GROUP_BYTES = 4


@dataclass(frozen=True, repr=False)
class StochasticRounding(AbstractStrategy):
    r"""Store X in 2, 4 or 8 bits per entry, rounded up or down at random so that the expectation is X.

    Groups of `group` consecutive entries share a lowest value l and a step s, both in bfloat16 and rounded outwards so
    that ``l <= x <= l + (2**bits - 1) s``. With ``t = (x - l) / s`` the code is ``floor(t + u)``, u uniform on [0, 1):
    one more than ``floor(t)`` with probability ``f = t - floor(t)``. Features of a row that share a group share one
    draw of u, shifted by a fixed number each (see `cheapgrad.sketch.dither`); no two rows share one. The strategy for
    memory: dX stays exact, nothing compounds with depth.

    Args:
        bits: 2, 4 or 8.
        group: entries per group, at least 8 and a multiple of 8.
        fused: compile what encodes and decodes into single passes, for this codec and for whatever else a layer stores
            by it (slopes, branches, masks); never what a forward pass returns. Takes seconds at the first step, once
            for each machine and version of torch, and a C++ compiler; without one a `FusingWarning` says so. No effect
            under `torch.compile`, where everything is.

    **Law** Bias 0 (to the rounding of single precision; the dither has 24 bits). ``Var dW = sum_ni s**2 f_ni (1 - f_ni)
    ||g_n||**2``, exactly, summed over the entries of dW: each of them meets one feature, and rows are independent.
    Errors of features of one row are dependent, so the variance of what mixes features (the norm of a row, a sum over
    features, a next product) is not that of independent errors; `entry_variance` holds for every entry.
    Saved: ``bits / 8 + 4 / group`` bytes per entry.

    Rounding l and s to bfloat16 adds no bias, whatever X's type: codes are drawn for the stored numbers. It widens s,
    by 2**-7 of s and ``2**-7 |l| / (2**bits - 1)`` at most, and the variance with it.
    Where X is bfloat16 or float16, decoded values are rounded to that type, to nearest: a bias of at most 2**-8
    (bfloat16) or 2**-11 (float16) of the larger neighbour on the grid, for each entry. A float16 entry whose upper
    neighbour lies beyond 65504, the largest float16, gets 65504 in its place: a bias towards zero of less than s.
    Groups are covered while entries and what they span stay under 3.3e38. Beyond, entries decode to NaN or infinity,
    all of the group where l or s is not finite, and to no wrong finite number.

    Raises:
        BudgetError: if `bits`, `group` or `fused` is not allowed.

    >>> StochasticRounding(bits=4).law.saved_bytes(LayerShape(rows=64, inputs=64, outputs=8))
    2304.0

    References:
        ActNN, ICML 2021 (groups of 256, a draw per entry, CUDA); rounding outwards of the bfloat16 scales and the
        shared draws are ours.
    """

    bits: int
    group: int = 64
    fused: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in _ALLOWED_BITS:
            raise BudgetError(f"bits must be 2, 4 or 8, but got {self.bits!r}; 4 bits suit most networks")
        check_count("group", self.group, minimum=8)
        if self.group % 8:
            raise BudgetError(f"group must be a multiple of 8, but got {self.group}; use e.g. group=64")
        if not isinstance(self.fused, bool):
            raise BudgetError(f"fused must be True or False, but got {self.fused!r}")

    @property
    def law(self) -> Law:
        """Bias, variance and cost."""
        return Law(
            estimates="what is stored of X, in few bits",
            bias=0.0,
            formula="dX: 0;  dW: Σ s² f(1 − f) ‖gₙ‖²",
            fails_when="used where the backward pass is not linear in what is stored; the variance of what mixes "
            "features of one row, whose errors share a draw, is another",
            moments=(Moment.STORED,),
            _variance=self._variance,
            _flops=lambda shape, moment: dense_flops(shape),
            _saved_bytes=self._saved_bytes,
        )

    @property
    def misplacement_reason(self) -> str:
        """Why it cannot sketch a cotangent."""
        return "the cotangent is not stored, so rounding it saves neither bytes nor products"

    def store(self, operands: Operands, memory: Any = None) -> tuple[Tensor, ...]:
        """Keep packed codes and the groups' scales."""
        matrix_NI = operands.stored_dense()
        dither = draw_dither(matrix_NI, matrix_NI.shape[0], matrix_NI.shape[1], self.group)
        groups = as_groups(matrix_NI, self.group)
        rows = groups, dither.draws.view(*groups.shape[:-1], -1)
        return work_by_rows(encode_groups, rows, (dither.shifts,), fused=self.fused, bits=self.bits)

    def store_twice(self, matrix_NI: Tensor, second_bits: int) -> tuple[Tensor, ...]:
        """Keep two independent codes of one matrix, the second one in `second_bits` bits."""
        rows, columns = matrix_NI.shape
        first, second = (draw_dither(matrix_NI, rows, columns, self.group) for _ in range(2))
        groups = as_groups(matrix_NI, self.group)
        parts = groups, *(dither.draws.view(*groups.shape[:-1], -1) for dither in (first, second))
        return work_by_rows(
            encode_groups_twice, parts, (first.shifts,), fused=self.fused, bits=self.bits, second_bits=second_bits
        )

    def store_images(self, images: Tensor) -> tuple[Tensor, ...]:
        """Keep codes of images ``[B, C, ...]`` in memory order: groups along pixels, draws along channels.

        Entries of one channel never share a draw, as those of one column of a matrix: the law is that of the matrix
        whose rows are pixels, with the steps that groups of neighbouring pixels have. `restore` returns the matrix
        ``[B, C * pixels]``.
        """
        batch, channels = images.shape[:2]
        planes = images.reshape(batch, channels, -1)
        pixels, group = planes.shape[2], self.group
        dither = draw_plane_dither(images, batch, channels, pixels, group)
        blocks, block = dither.draws.shape[1], dither.shifts.shape[0]
        if pixels % group:
            entries = dither.entries().flatten()
            missing = -entries.shape[0] % group
            rows = as_groups(planes, group), torch.nn.functional.pad(entries, (0, missing)).view(-1, group)
            shifts = entries.new_zeros(1)
        else:
            cut = pixels // group, group
            rows = planes.view(batch, blocks, block, *cut), dither.draws.view(batch, blocks, 1, *cut)
            shifts = dither.shifts.unsqueeze(2)
        return work_by_rows(encode_groups, rows, (shifts,), fused=self.fused, bits=self.bits)

    def restore(self, kept: tuple[Tensor, ...], rows: int, inputs: int, dtype: torch.dtype) -> EncodedMatrix:
        """Return the codes as a stand-in for X."""
        return EncodedMatrix(kept, self, rows, inputs, dtype)

    def _variance(self, tensors: LayerTensors, moment: Moment) -> Variance:
        stored_QNI, cotangent_QNO = stacked(tensors)
        matrix_NI = flat(stored_QNI)
        noise_NI = self.entry_variance(matrix_NI)
        noise_QNI = noise_NI.view(matrix_NI.shape[0], *stored_QNI.shape[::2]).transpose(0, 1)
        return Variance(zero(matrix_NI), (noise_QNI.sum(-1) * cotangent_QNO.square().sum(-1)).sum())

    def entry_variance(self, matrix_NI: Tensor) -> Tensor:
        """Return ``s**2 f (1 - f)`` per entry, in float64."""
        step_NI, up_NI = rounding_steps(matrix_NI, self)
        return step_NI**2 * up_NI * (1 - up_NI)

    def _saved_bytes(self, shape: LayerShape, moment: Moment) -> float:
        groups = -(-shape.rows * shape.inputs // self.group)
        return float(groups * (self.group * self.bits // 8 + _GROUP_BYTES))


class EncodedMatrix(AbstractStoredMatrix):
    """X as packed codes with a scale per group."""

    def __init__(
        self, kept: tuple[Tensor, ...], codec: StochasticRounding, rows: int, inputs: int, dtype: torch.dtype
    ) -> None:
        self._packed, self._scales = kept
        self._codec = codec
        self._rows, self._inputs = rows, inputs
        self._dtype = dtype

    def _decode(self, packed: Tensor, scales: Tensor) -> Tensor:
        """Return the values of whole groups, shape ``[groups, group]``."""
        codec = self._codec
        options = {"bits": codec.bits, "dtype": self._dtype}
        entries = packed.numel() * 8 // codec.bits
        return work_by_rows(decode_groups, (packed, scales), fused=codec.fused, entries=entries, **options)[0]

    def dense(self) -> Tensor:
        """Return the decoded matrix."""
        values = self._decode(self._packed, self._scales).flatten()
        return values[: self._rows * self._inputs].view(self._rows, self._inputs)

    def rows(self, index_K: Tensor) -> Tensor:
        """Decode the given rows only, where rows are whole groups."""
        if self._inputs % self._codec.group:
            return super().rows(index_K)
        packed, scales = (
            tensor.reshape(self._rows, -1).index_select(0, index_K).view(-1, tensor.shape[-1])
            for tensor in (self._packed, self._scales)
        )
        return self._decode(packed, scales).view(-1, self._inputs)


def rounding_steps(matrix_NI: Tensor, codec: StochasticRounding) -> tuple[Tensor, Tensor]:
    """Return the step s and the chance f of being rounded up, per entry, in float64."""
    groups = as_groups(matrix_NI, codec.group)
    low, step = scales_of(groups, codec.bits)
    position = torch.where(step != 0, (groups - low) / torch.where(step != 0, step, 1.0), 0.0).double()
    step_NI, up_NI = (
        part.flatten()[: matrix_NI.numel()].view(matrix_NI.shape)
        for part in (step.double().expand(groups.shape), position - position.floor())
    )
    return step_NI, up_NI


def as_groups(matrix: Tensor, group: int) -> Tensor:
    """Return the entries as ``[groups, group]``, the last group padded with the last entry.

    Inside compiled graphs it is ``[N, groups of a row, group]`` where rows are whole groups: the compiler fuses what
    computes the matrix with what reads the groups, and works on many entries at a time as long as no index is divided.
    """
    columns = matrix.shape[-1]
    if torch.compiler.is_compiling() and matrix.dim() == 2 and columns % group == 0:
        return matrix.reshape(-1, columns // group, group)
    entries = matrix.flatten()
    missing = -entries.shape[0] % group
    if missing:
        entries = torch.cat([entries, entries[-1:].expand(missing)])
    return entries.view(-1, group)
