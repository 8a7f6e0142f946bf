"""Two independent codes of a normalised image, made and read piece by piece."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cheapgrad.sketch import DenseMatrix, Moment, Operands, StochasticRounding
from cheapgrad.sketch._codes import decode_groups, encode_groups, encode_groups_twice
from cheapgrad.sketch.dither import draw_dither
from cheapgrad.sketch.fusing import work_by_rows

# Bits of the second code, which is only ever averaged over all entries that are normalised together.
_SECOND_BITS = 2
# Tensors that make up a code.
_PARTS = 2


def second_codec(codec: StochasticRounding) -> StochasticRounding:
    """Return the codec of the second code: two bits.

    >>> second_codec(StochasticRounding(bits=8))
    StochasticRounding(bits=2)
    """
    return replace(codec, bits=_SECOND_BITS)


def matrix_sizes(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and columns that an image is encoded as: a row is what one channel of one example holds.

    >>> matrix_sizes((8, 3, 5, 5)), matrix_sizes((8, 3))
    ((24, 25), (8, 3))
    """
    rows = shape[0] if len(shape) == 2 else shape[0] * shape[1]
    return rows, math.prod(shape) // max(rows, 1)


def encode_normalised(
    x: Tensor, centre_BC: Tensor, scale_BC: Tensor, codec: StochasticRounding, *, twice: bool
) -> tuple[Tensor, ...]:
    """Return the code of ``(x - centre) * scale``, and if `twice` a second one.

    Args:
        x: image ``[B, C, ...]``.
        centre_BC: means.
        scale_BC: factors.
        codec: for the first code.
        twice: whether there is a second one.
    """
    rows, columns = matrix_sizes(x.shape)
    x_NI, centre_NI, scale_NI = x.reshape(rows, columns), centre_BC.reshape(rows, -1), scale_BC.reshape(rows, -1)
    if columns % codec.group:
        matrix_NI = _normalise(x_NI, centre_NI, scale_NI)
        if twice:
            return codec.store_twice(matrix_NI, second_codec(codec).bits)
        return codec.store(Operands(Moment.STORED, DenseMatrix(matrix_NI)))
    dithers = [draw_dither(x_NI, rows, columns, codec.group) for _ in range(2 if twice else 1)]
    groups = [_as_groups(tensor, columns, codec.group) for tensor in (x_NI, centre_NI, scale_NI)]
    draws = [dither.draws.view(rows, columns // codec.group, 1) for dither in dithers]
    options = {"bits": codec.bits, "second_bits": second_codec(codec).bits}
    return work_by_rows(_encode, (*groups, *draws), (dithers[0].shifts,), fused=codec.fused, **options)


def _normalise(x: Tensor, centre: Tensor, scale: Tensor) -> Tensor:
    return (x.to(scale.dtype) - centre) * scale


def _as_groups(matrix: Tensor, columns: int, group: int) -> Tensor:
    """Return ``[N, groups, group]``, or ``[N, 1, 1]`` of what is one number for a row."""
    rows, width = matrix.shape
    return matrix.view(rows, columns // group, group) if width == columns > 1 else matrix.view(rows, 1, 1)


def _encode(
    x: Tensor, centre: Tensor, scale: Tensor, *draws_and_shifts: Tensor, bits: int, second_bits: int
) -> tuple[Tensor, ...]:
    """Return codes of groups in rows, each tensor ``[N, groups, ...]``."""
    x_hat, (draws, *second, shifts) = _normalise(x, centre, scale), draws_and_shifts
    if not second:
        return encode_groups(x_hat, draws, shifts, bits=bits)
    return encode_groups_twice(x_hat, draws, second[0], shifts, bits=bits, second_bits=second_bits)


@dataclass(frozen=True)
class NormCodes:
    """What `encode_normalised` returned.

    Attributes:
        codes: its tensors; a second code need not be there.
        codec: of the first code.
        shape: of the image.
        dtype: to compute in.
    """

    codes: tuple[Tensor, ...]
    codec: StochasticRounding
    shape: tuple[int, ...]
    dtype: torch.dtype

    def sums_with(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums of grad, of grad times the first and of grad times the second code, ``[B * C]`` each.

        Args:
            grad: ``[B, C, ...]``.
        """
        rows, _ = matrix_sizes(self.shape)
        parts = (self._cut(grad.reshape(rows, -1)), *self._parts())
        is_matrix = len(self.shape) == 2
        options = self._options | {"second_bits": second_codec(self.codec).bits, "is_matrix": is_matrix}
        sums = work_by_rows(_sum_products, parts, fused=self.codec.fused, **options)
        return sums[0], sums[1], sums[-1]

    def combine(self, grad: Tensor, *, of_grad: Tensor, of_code: Tensor, constant: Tensor) -> Tensor:
        """Return ``of_grad * grad + of_code * first code + constant``; the factors are ``[B, C]``."""
        rows, _ = matrix_sizes(self.shape)
        grad_and_factors = [self._cut(tensor.reshape(rows, -1)) for tensor in (grad, of_grad, of_code, constant)]
        parts = (*grad_and_factors, *self._parts()[:_PARTS])
        return work_by_rows(_combine, parts, fused=self.codec.fused, **self._options)[0].view(self.shape)

    @property
    def _is_in_groups(self) -> bool:
        return matrix_sizes(self.shape)[1] % self.codec.group == 0

    @property
    def _options(self) -> dict[str, Any]:
        return {"bits": self.codec.bits, "is_in_groups": self._is_in_groups, "dtype": self.dtype}

    def _cut(self, matrix: Tensor) -> Tensor:
        columns = matrix_sizes(self.shape)[1]
        return _as_groups(matrix, columns, self.codec.group if self._is_in_groups else columns)

    def _parts(self) -> tuple[Tensor, ...]:
        """Return the codes' tensors by rows, ``[N, groups, ...]``; decoded where rows are no whole groups."""
        rows, columns = matrix_sizes(self.shape)
        if self._is_in_groups:
            return tuple(tensor.reshape(rows, columns // self.codec.group, -1) for tensor in self.codes)
        codes = (self.codes[:_PARTS], self.codec), (self.codes[_PARTS:], second_codec(self.codec))
        decoded = [codec.restore(code, rows, columns, self.dtype).dense() for code, codec in codes if code]
        # A second tensor, empty, in the place of the scales.
        return tuple(part for dense in decoded for part in (self._cut(dense), dense[:, :0].unsqueeze(2)))


def _decode(packed: Tensor, scales: Tensor, bits: int, is_in_groups: bool, dtype: torch.dtype) -> Tensor:
    return decode_groups(packed, scales, bits=bits, dtype=dtype)[0] if is_in_groups else packed


def _sum_products(
    grad: Tensor,
    *codes: Tensor,
    bits: int,
    second_bits: int,
    is_in_groups: bool,
    dtype: torch.dtype,
    is_matrix: bool,
) -> tuple[Tensor, ...]:
    """Return, for each row, the sums of grad and of grad times each code; the entries themselves for a matrix."""
    grad = grad.to(dtype)
    terms = [grad]
    for place, width in zip(range(0, len(codes), _PARTS), (bits, second_bits), strict=False):
        code = _decode(codes[place], codes[place + 1], width, is_in_groups, dtype)
        # Not in place: under vmap the code may have an axis that the cotangent does not have.
        terms.append(code * grad)
    return tuple(term.flatten(1) if is_matrix else term.sum((1, 2)) for term in terms)


def _combine(
    grad: Tensor,
    of_grad: Tensor,
    of_code: Tensor,
    constant: Tensor,
    packed: Tensor,
    scales: Tensor,
    *,
    bits: int,
    is_in_groups: bool,
    dtype: torch.dtype,
) -> tuple[Tensor]:
    code = _decode(packed, scales, bits, is_in_groups, dtype)
    return (torch.addcmul(grad.to(dtype) * of_grad, code, of_code) + constant,)
