"""Two independent codes of a normalised image, made and read piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cheapgrad.sketch import DenseMatrix, Moment, Operands, StochasticRounding
from cheapgrad.sketch.transforms import is_transformed

# Bits of the second code, which is only ever averaged over all entries that are normalised together.
_SECOND_BITS = 2
# Tensors that make up a code.
_PARTS = 2
# Entries worked on at a time on a CPU, so that what lies between two steps stays in the processor's cache.
_PIECE = 1 << 17


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
    codecs = (codec, second_codec(codec)) if twice else (codec,)
    pieces = []
    for piece in _pieces(x, codec.group):
        matrix = torch.sub(x_NI[piece].to(scale_NI.dtype), centre_NI[piece]) * scale_NI[piece]
        operands = Operands(Moment.STORED, DenseMatrix(matrix))
        pieces.append([tensor for each in codecs for tensor in each.store(operands)])
    return tuple(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*pieces, strict=True))


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
        grad_NI = self._as_rows(grad)
        first, second = self.codes[:_PARTS], self.codes[_PARTS:]

        def sums(piece: slice) -> tuple[Tensor, ...]:
            part = self._pixels(grad_NI[piece].to(self.dtype))
            products = (self._pixels(self._decode(code, codec, piece)) * part for code, codec in with_codecs)
            return part.sum(1), *(product.sum(1) for product in products)

        with_codecs = [(first, self.codec)] + ([(second, second_codec(self.codec))] if second else [])
        joined = _join(sums, _pieces(grad, self.codec.group))
        return joined[0], joined[1], joined[-1]

    def combine(self, grad: Tensor, *, of_grad: Tensor, of_code: Tensor, constant: Tensor) -> Tensor:
        """Return ``of_grad * grad + of_code * first code + constant``; the factors are ``[B, C]``."""
        grad_NI = self._as_rows(grad)
        factors = [factor.reshape(grad_NI.shape[0], -1) for factor in (of_grad, of_code, constant)]

        result = torch.empty_like(grad_NI, dtype=self.dtype)
        for piece in _pieces(grad, self.codec.group):
            code = self._decode(self.codes[:_PARTS], self.codec, piece)
            if piece == slice(None):
                # Not in place: under vmap the code may have an axis that the cotangent does not have.
                result = torch.addcmul(grad_NI * factors[0], code, factors[1]) + factors[2]
            else:
                part = torch.mul(grad_NI[piece], factors[0][piece], out=result[piece])
                part.addcmul_(code, factors[1][piece]).add_(factors[2][piece])
        return result.view(self.shape)

    def _as_rows(self, image: Tensor) -> Tensor:
        return image.reshape(matrix_sizes(self.shape))

    def _pixels(self, matrix: Tensor) -> Tensor:
        """Return rows of the matrix as ``[pairs of example and channel, pixels]``."""
        return matrix.reshape(-1, 1) if len(self.shape) == 2 else matrix

    def _decode(self, code: tuple[Tensor, ...], codec: StochasticRounding, piece: slice) -> Tensor:
        rows, columns = matrix_sizes(self.shape)
        if piece != slice(None):
            packed, scales = code
            groups = scales.shape[0] // packed.shape[0]
            first, last = (-(-row * columns // codec.group) for row in (piece.start, piece.stop))
            code = packed[first // groups : -(-last // groups)], scales[first:last]
            rows = piece.stop - piece.start
        return codec.restore(code, rows, columns, self.dtype).dense()


def _pieces(image: Tensor, group: int) -> Iterator[slice]:
    """Yield slices of rows that hold whole groups each; all rows at once where pieces save nothing or cannot be cut."""
    rows, columns = matrix_sizes(image.shape)
    unit = group // math.gcd(columns, group)
    piece = max(1, _PIECE // max(1, columns * unit)) * unit
    may_be_cut = not torch.compiler.is_compiling() and type(image) is Tensor and image.device.type == "cpu"
    if rows <= piece or not may_be_cut or is_transformed(image):
        yield slice(None)
        return
    for start in range(0, rows, piece):
        yield slice(start, min(rows, start + piece))


def _join(work: Callable[[slice], tuple[Tensor, ...]], pieces: Iterator[slice]) -> tuple[Tensor, ...]:
    results = [work(piece) for piece in pieces]
    return tuple(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*results, strict=True))
