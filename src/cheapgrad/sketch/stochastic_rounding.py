"""Stochastic rounding: a codec whose decoded value has the original as expectation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.errors import BudgetError, check_count
from cheapgrad.sketch import random
from cheapgrad.sketch._strategy import AbstractStrategy, flat, stacked, zero
from cheapgrad.sketch.bits import pack_bits, unpack_bits
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
    that ``l <= x <= l + (2**bits - 1) s``. With ``t = (x - l) / s`` the code is ``floor(t)`` or ``floor(t) + 1``, the
    latter with probability ``t - floor(t)``. The strategy for memory: dX stays exact, nothing compounds with depth.

    Args:
        bits: 2, 4 or 8.
        group: entries per group, at least 8 and a multiple of 8.

    **Law** Bias 0 (the dither has 24 bits). ``Var dW = sum_ni s**2 f_ni (1 - f_ni) ||g_n||**2`` with ``f = t -
    floor(t)``, exactly.
    Saved: ``bits / 8 + 4 / group`` bytes per entry.

    Raises:
        BudgetError: if `bits` or `group` is not allowed.

    >>> StochasticRounding(bits=4).law.saved_bytes(LayerShape(rows=64, inputs=64, outputs=8))
    2304.0

    References:
        ActNN, ICML 2021 (groups of 256, CUDA); rounding outwards of the bfloat16 scales is ours.
    """

    bits: int
    group: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in _ALLOWED_BITS:
            raise BudgetError(f"bits must be 2, 4 or 8, but got {self.bits!r}; 4 bits suit most networks")
        check_count("group", self.group, minimum=8)
        if self.group % 8:
            raise BudgetError(f"group must be a multiple of 8, but got {self.group}; use e.g. group=64")

    @property
    def law(self) -> Law:
        """Bias, variance and cost."""
        return Law(
            estimates="what is stored of X, in few bits",
            bias=0.0,
            formula="dX: 0;  dW: Σ s² f(1 − f) ‖gₙ‖²",
            fails_when="used where the backward pass is not linear in what is stored",
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
        groups = _as_groups(operands.stored_dense(), self.group)
        low, step = _scales(groups, self.bits)
        position = _position(groups, low, step)
        dither = random.uniform(groups, groups.shape, double=False)
        # Never above the last code, whatever the rounding of the division does; NaN goes to 0 and lives in the scales.
        codes = torch.nan_to_num((position + dither).floor()).clamp(0, 2**self.bits - 1).to(torch.uint8)
        return pack_bits(codes.flatten(), self.bits), torch.cat([low, step], 1).to(torch.bfloat16)

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
        groups = _as_groups(matrix_NI, self.group)
        low, step = _scales(groups, self.bits)
        position = _position(groups, low, step).double()
        fraction = position - position.floor()
        noise = step.double() ** 2 * fraction * (1 - fraction)
        return noise.flatten()[: matrix_NI.numel()].view(matrix_NI.shape)

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
        codes = unpack_bits(packed.flatten(), self._codec.bits, scales.shape[0] * self._codec.group)
        # In single precision at least: as float16 a bfloat16 scale may overflow or vanish.
        wide = torch.promote_types(self._dtype, torch.float32)
        grouped = codes.view(-1, self._codec.group).to(wide)
        values = torch.addcmul(scales[:, :1].to(wide), grouped, scales[:, 1:].to(wide))
        if self._dtype is not torch.float16:
            return values.to(self._dtype)
        # Scales are rounded outwards: what lies beyond the largest float16 stands for it.
        largest = torch.finfo(torch.float16).max
        return torch.where(values.isfinite(), values.clamp(-largest, largest), values).to(self._dtype)

    def dense(self) -> Tensor:
        """Return the decoded matrix."""
        values = self._decode(self._packed, self._scales).flatten()
        return values[: self._rows * self._inputs].view(self._rows, self._inputs)

    def rows(self, index_K: Tensor) -> Tensor:
        """Decode the given rows only, where rows are whole groups."""
        if self._inputs % self._codec.group:
            return super().rows(index_K)
        packed = self._packed.view(self._rows, -1).index_select(0, index_K)
        scales = self._scales.view(self._rows, -1, 2).index_select(0, index_K)
        return self._decode(packed, scales.flatten(0, 1)).view(-1, self._inputs)


def _as_groups(matrix: Tensor, group: int) -> Tensor:
    """Return the entries as ``[groups, group]`` in float32 at least, the last group padded with the last entry."""
    entries = matrix.to(torch.promote_types(matrix.dtype, torch.float32)).flatten()
    missing = -entries.shape[0] % group
    if missing:
        entries = torch.cat([entries, entries[-1:].expand(missing)])
    return entries.view(-1, group)


def _scales(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return lowest value and step per group ``[groups, 1]``, bfloat16 numbers that make the codes cover the group."""
    low = _round_down(groups.amin(1, keepdim=True))
    span = groups.amax(1, keepdim=True) - low
    step = -_round_down(-span / (2**bits - 1))
    return low, step


def _round_down(values: Tensor) -> Tensor:
    """Round down to a bfloat16 number, held in the dtype of `values`; NaN and infinities stay.

    By masking bits: a cast there and back may be elided by a compiler, which would quantise with a step other than the
    stored one and bias every value.
    """
    single = values.float()
    single = torch.where(
        single.to(values.dtype) > values, torch.nextafter(single, single.new_full((), -torch.inf)), single
    )
    bits = single.view(torch.int32)
    toward_zero = bits & -0x10000
    # Sign and magnitude: one unit more in the upper half moves a negative number away from zero.
    away = torch.where((single < 0) & (bits != toward_zero), toward_zero + 0x10000, toward_zero)
    return torch.where(torch.isfinite(single), away.view(torch.float32), single).to(values.dtype)


def _position(groups: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """Return ``(x - low) / step``, zero where the step is zero."""
    return torch.where(step != 0, (groups - low) / torch.where(step != 0, step, 1.0), 0.0)
