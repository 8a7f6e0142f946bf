"""Subsampled randomised Hadamard transform."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cheapgrad.sketch import random
from cheapgrad.sketch.projections._abstract import AbstractProjection, DrawnProjection, Moments


def hadamard_transform(matrix_ND: Tensor) -> Tensor:
    """Return the orthonormal Walsh-Hadamard transform along rows; their number must be a power of two.

    The transform of size ``2**m`` is a Kronecker product; it is applied as one small dense product per block of up to
    64 rows, in log_64 N passes.
    """
    size = matrix_ND.shape[0]
    stride = 1
    while stride < size:
        radix = min(64, size // stride)
        block = _hadamard_matrix(radix, matrix_ND)
        split = matrix_ND.reshape(-1, radix, stride * matrix_ND.shape[1])
        matrix_ND = (block @ split).view(size, -1)
        stride *= radix
    return matrix_ND


def _hadamard_matrix(size: int, like: Tensor) -> Tensor:
    matrix = torch.ones(1, 1, dtype=like.dtype, device=like.device)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0) / 2**0.5
    return matrix


def padded_size(size: int) -> int:
    """Return the smallest power of two that is at least `size`."""
    return 1 << max(0, (size - 1).bit_length())


class DrawnHadamard(DrawnProjection):
    """Random signs, a Hadamard transform, and a random subset of its coordinates."""

    def __init__(self, negative_N: Tensor, index_K: Tensor) -> None:
        super().__init__(negative_N.shape[0], index_K.shape[0])
        self._negative_N = negative_N
        self._index_K = index_K
        self._padded = padded_size(self.size)

    def _signs(self, dtype: torch.dtype) -> Tensor:
        return (1 - 2 * self._negative_N.to(dtype)).unsqueeze(1)

    def project(self, matrix_ND: Tensor) -> Tensor:
        """Return ``sqrt(N' / K) P H D @ matrix``, N' the padded length."""
        signed = matrix_ND * self._signs(matrix_ND.dtype)
        padded = torch.nn.functional.pad(signed, (0, 0, 0, self._padded - self.size))
        return hadamard_transform(padded).index_select(0, self._index_K) * (self._padded / self.count) ** 0.5

    def transpose_project(self, matrix_KD: Tensor) -> Tensor:
        """Return the transpose applied to a matrix."""
        spread = matrix_KD.new_zeros(self._padded, matrix_KD.shape[1]).index_copy(0, self._index_K, matrix_KD)
        lifted = hadamard_transform(spread)[: self.size] * self._signs(matrix_KD.dtype)
        return lifted * (self._padded / self.count) ** 0.5

    def tensors(self) -> tuple[Tensor, ...]:
        """Return signs (one byte each) and kept coordinates."""
        return self._negative_N, self._index_K


@dataclass(frozen=True, repr=False)
class Hadamard(AbstractProjection):
    r"""``S = sqrt(N' / K) P H D``: random signs D, orthonormal Hadamard H, K of N' coordinates without replacement P.

    N' is N padded to a power of two; the scale uses N', so the estimate is unbiased for every N.

    **Law** With ``F = ||X||**2 ||G||**2 + 2 (||G.T X||**2 - sum_n ||x_n||**2 ||g_n||**2)`` and ``T = ||G.T X||**2``,
    ``Var dW = (N' - K) / (K (N' - 1)) (F - T)``; relative variance of dX
    ``(N' / K - 1) (N - 1) / (N' - 1)``.

    References:
        N. Ailon and B. Chazelle, SIAM J. Comput. 39 (2009). Published code for this sketch of gradients scales by r * N
        where N / r is right.
    """

    def draw(self, like: Tensor, size: int, count: int, generator: torch.Generator | None = None) -> DrawnHadamard:
        """Draw signs and coordinates."""
        negative_N = random.signs(like, (size,), generator=generator)
        keys = random.uniform(like, (padded_size(size),), generator=generator)
        return DrawnHadamard(negative_N, keys.argsort()[:count].clone())

    def rebuild(self, tensors: tuple[Tensor, ...], size: int, count: int, like: Tensor) -> DrawnHadamard:
        """Return the held signs and coordinates."""
        return DrawnHadamard(tensors[0], tensors[1])

    def input_factor(self, size: int, count: int) -> float:
        """Return ``(N' / K - 1) (N - 1) / (N' - 1)``: the share of the error that falls on the N real rows."""
        padded = padded_size(size)
        return (padded / count - 1) * (size - 1) / max(padded - 1, 1)

    def weight_variance(self, moments: Moments, size: int, count: int) -> Tensor:
        """Return ``(N' - K) / (K (N' - 1)) (F - T)``."""
        padded = padded_size(size)
        fourth = moments.product + 2 * (moments.gradient - moments.rows)
        return (padded - count) / (count * max(padded - 1, 1)) * (fourth - moments.gradient)

    def flops(self, size: int, count: int, width: int) -> float:
        """Return the FLOPs of the block products of `hadamard_transform`."""
        padded, stride, total = padded_size(size), 1, 0.0
        while stride < padded:
            radix = min(64, padded // stride)
            total += 2.0 * padded * radix * width
            stride *= radix
        return total

    def saved_bytes(self, size: int, count: int) -> float:
        """Return one byte per sign and 8 per kept coordinate."""
        return float(size + 8 * count)
