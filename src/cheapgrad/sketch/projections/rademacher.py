"""Projection by random signs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cheapgrad.sketch import random
from cheapgrad.sketch.bits import pack_bits, unpack_bits
from cheapgrad.sketch.projections._abstract import AbstractProjection, DrawnProjection, Moments


class DrawnSigns(DrawnProjection):
    """A projection by signs ``[K, N] / sqrt(K)``, held as one bit per entry."""

    def __init__(self, packed: Tensor, size: int, count: int) -> None:
        super().__init__(size, count)
        self._packed = packed

    def _matrix(self, dtype: torch.dtype) -> Tensor:
        negative_KN = unpack_bits(self._packed, 1, self.size * self.count).view(self.count, self.size)
        return (1 - 2 * negative_KN.to(dtype)) / self.count**0.5

    def project(self, matrix_ND: Tensor) -> Tensor:
        """Return ``S @ matrix``."""
        return self._matrix(matrix_ND.dtype) @ matrix_ND

    def transpose_project(self, matrix_KD: Tensor) -> Tensor:
        """Return ``S.T @ matrix``."""
        return self._matrix(matrix_KD.dtype).mT @ matrix_KD

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the packed signs."""
        return (self._packed,)


@dataclass(frozen=True, repr=False)
class Rademacher(AbstractProjection):
    r"""S has independent fair signs over ``sqrt(K)``.

    **Law** ``Var dW = (||X||**2 ||G||**2 + ||G.T X||**2 - 2 sum_n ||x_n||**2 ||g_n||**2) / K``; relative variance of dX
    ``(N - 1) / K``. Held: one bit per entry of S.

    References:
        B. Bershatsky et al., arXiv:2201.13195, with the variance restated.
    """

    def draw(self, like: Tensor, size: int, count: int, generator: torch.Generator | None = None) -> DrawnSigns:
        """Draw the signs."""
        negative = random.signs(like, (count * size,), generator=generator)
        return DrawnSigns(pack_bits(negative.to(torch.uint8), 1), size, count)

    def rebuild(self, tensors: tuple[Tensor, ...], size: int, count: int, like: Tensor) -> DrawnSigns:
        """Return the held signs."""
        return DrawnSigns(tensors[0], size, count)

    def input_factor(self, size: int, count: int) -> float:
        """Return ``(N - 1) / K``."""
        return (size - 1) / count

    def weight_variance(self, moments: Moments, size: int, count: int) -> Tensor:
        """Return ``(||X||**2 ||G||**2 + ||G.T X||**2 - 2 sum_n ||x_n||**2 ||g_n||**2) / K``."""
        return (moments.product + moments.gradient - 2 * moments.rows) / count

    def flops(self, size: int, count: int, width: int) -> float:
        """Return ``2 K N D``."""
        return 2.0 * size * count * width

    def saved_bytes(self, size: int, count: int) -> float:
        """Return ``K N / 8``."""
        return float(-(-size * count // 8))
