"""Stochastic rounding: a codec whose decoded value has the original as expectation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.errors import BudgetError, check_count
from cheapgrad.sketch._strategy import AbstractStrategy, flat, stacked, zero
from cheapgrad.sketch.bits import pack_bits, unpack_bits
from cheapgrad.sketch.dither import Dither, draw_dither
from cheapgrad.sketch.law import Law, LayerShape, LayerTensors, Variance, dense_flops
from cheapgrad.sketch.moment import Moment
from cheapgrad.sketch.operands import AbstractStoredMatrix, Operands
from cheapgrad.sketch.transforms import is_transformed

_ALLOWED_BITS = (2, 4, 8)
# Each group keeps its lowest value and its step in bfloat16.
_GROUP_BYTES = 4
# Entries worked on at a time on a CPU, so that what lies between two steps stays in the processor's cache.
_CHUNK = 1 << 19
# The largest position stays this far below the last code, so that no rounding makes a dither pass beyond it.
_MARGIN = 1 + 2.0**-20


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

    **Law** Bias 0 (to the rounding of single precision; the dither has 24 bits). ``Var dW = sum_ni s**2 f_ni (1 - f_ni)
    ||g_n||**2``, exactly, summed over the entries of dW: each of them meets one feature, and rows are independent.
    Errors of features of one row are dependent, so the variance of what mixes features (the norm of a row, a sum over
    features, a next product) is not that of independent errors; `entry_variance` holds for every entry.
    Saved: ``bits / 8 + 4 / group`` bytes per entry.

    Raises:
        BudgetError: if `bits` or `group` is not allowed.

    >>> StochasticRounding(bits=4).law.saved_bytes(LayerShape(rows=64, inputs=64, outputs=8))
    2304.0

    References:
        ActNN, ICML 2021 (groups of 256, a draw per entry, CUDA); rounding outwards of the bfloat16 scales and the
        shared draws are ours.
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
        groups = _as_groups(matrix_NI, self.group)
        low, step = _scales(groups, self.bits)
        packed = _encode(groups, low, step, dither, self.bits, _groups_per_run(matrix_NI.shape[1], self.group))
        return packed, torch.cat([low, step], 1).to(torch.bfloat16)

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
        # In single precision at least: as float16 a bfloat16 scale may overflow or vanish.
        wide = torch.promote_types(self._dtype, torch.float32)
        codes = unpack_bits(packed, self._codec.bits, packed.shape[-1] * 8 // self._codec.bits)
        values = codes.to(wide).view(-1, self._codec.group)
        values.mul_(scales[:, 1:].to(wide)).add_(scales[:, :1].to(wide))
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
        packed = self._packed.index_select(0, index_K)
        scales = self._scales.view(self._rows, -1, 2).index_select(0, index_K)
        return self._decode(packed, scales.flatten(0, 1)).view(-1, self._inputs)


def rounding_steps(matrix_NI: Tensor, codec: StochasticRounding) -> tuple[Tensor, Tensor]:
    """Return the step s and the chance f of being rounded up, per entry, in float64."""
    groups = _as_groups(matrix_NI, codec.group)
    low, step = _scales(groups, codec.bits)
    position = torch.where(step != 0, (groups - low) / torch.where(step != 0, step, 1.0), 0.0).double()
    step_NI, up_NI = (
        part.flatten()[: matrix_NI.numel()].view(matrix_NI.shape)
        for part in (step.double().expand(groups.shape), position - position.floor())
    )
    return step_NI, up_NI


def _as_groups(matrix: Tensor, group: int) -> Tensor:
    """Return the entries as ``[groups, group]``, the last group padded with the last entry."""
    entries = matrix.flatten()
    missing = -entries.shape[0] % group
    if missing:
        entries = torch.cat([entries, entries[-1:].expand(missing)])
    return entries.view(-1, group)


def _groups_per_run(columns: int, group: int) -> int:
    """Return how many groups are packed together: those of a row, or one where rows are no whole groups."""
    return columns // group if columns % group == 0 else 1


def _encode(groups: Tensor, low: Tensor, step: Tensor, dither: Dither, bits: int, per_run: int) -> Tensor:
    """Return packed codes ``floor((x - low) / step + dither)``, a line per run of `per_run` groups.

    A group that is not finite, or constant, gets any codes: its scales make NaN, or one value, of them all.
    """
    count, group = groups.shape
    wide = low.dtype
    divisor = torch.where(step == 0, 1.0, step)

    def encode(part: slice, scratch: Tensor | None, other: Tensor | None) -> Tensor:
        position = torch.sub(groups[part], low[part], out=scratch).div_(divisor[part])
        # Not in place without scratch: under vmap the dither may have an axis that the entries do not have.
        position = torch.add(position, dither.part(part, other), out=scratch)
        # Positions are not negative, so that conversion, which cuts off, rounds down. Conversion to signed integers is
        # done many at a time.
        codes = position.to(torch.int16 if bits == 8 else torch.int8)
        codes = codes.to(torch.uint8) if bits == 8 else codes.view(torch.uint8)
        return pack_bits(codes.view(-1, per_run * group), bits)

    chunk = max(1, _CHUNK // (per_run * group)) * per_run
    if count <= chunk or not _may_be_cut(groups):
        return encode(slice(None), None, None)
    packed = torch.empty(count // per_run, per_run * group * bits // 8, dtype=torch.uint8)
    scratch, other = torch.empty(chunk, group, dtype=wide), torch.empty(chunk, group, dtype=torch.float32)
    for start in range(0, count, chunk):
        stop = min(count, start + chunk)
        part = slice(start, stop)
        packed[start // per_run : stop // per_run] = encode(part, scratch[: stop - start], other[: stop - start])
    return packed


def _scales(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return lowest value and step per group ``[groups, 1]``, bfloat16 numbers that make the codes cover the group."""
    wide = torch.promote_types(groups.dtype, torch.float32)
    low = _round_down(groups.amin(1, keepdim=True).to(wide))
    span = groups.amax(1, keepdim=True).to(wide) - low
    step = -_round_down(span * (-_MARGIN / (2**bits - 1)))
    return low, step


def _round_down(values: Tensor) -> Tensor:
    """Return the next bfloat16 number below or at `values`, held in their dtype; what is not finite stays so.

    By masking bits: a cast there and back may be elided by a compiler, which would quantise with a step other than the
    stored one and bias every value.
    """
    single = values.float()
    if values.dtype is torch.float64:
        below = torch.nextafter(single, single.new_full((), -torch.inf))
        single = torch.where(single.to(values.dtype) > values, below, single)
    bits = single.view(torch.int32)
    # Sign and magnitude: cutting off the lower half rounds a negative number up, unless a full half is added first.
    rounded = (bits + ((bits >> 31) & 0xFFFF)) & -0x10000
    # Only NaN differs from itself.
    return torch.where(single == single, rounded.view(torch.float32), single).to(values.dtype)


def _may_be_cut(tensor: Tensor) -> bool:
    """Tell whether to work in pieces: on a CPU, where nothing watches or compiles what is done."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not is_transformed(tensor)
    )
