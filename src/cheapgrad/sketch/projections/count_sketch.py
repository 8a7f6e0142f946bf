"""Count-sketch: every row goes to one random bin with a random sign."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cheapgrad.sketch import random
from cheapgrad.sketch.projections._abstract import AbstractProjection, DrawnProjection, Moments


class DrawnHash(DrawnProjection):
    """Bins and signs of the rows: bin b of row n is held as ``b`` for a plus and ``-1 - b`` for a minus."""

    def __init__(self, signed_bin_N: Tensor, count: int) -> None:
        super().__init__(signed_bin_N.shape[0], count)
        self._signed_bin_N = signed_bin_N

    def _bins_and_signs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        negative = self._signed_bin_N < 0
        bins = torch.where(negative, -1 - self._signed_bin_N, self._signed_bin_N)
        return bins, (1 - 2 * negative.to(dtype)).unsqueeze(1)

    def project(self, matrix_ND: Tensor) -> Tensor:
        """Return ``S @ matrix``: signed rows added up in their bins."""
        bins, signs = self._bins_and_signs(matrix_ND.dtype)
        return matrix_ND.new_zeros(self.count, matrix_ND.shape[1]).index_add(0, bins, matrix_ND * signs)

    def transpose_project(self, matrix_KD: Tensor) -> Tensor:
        """Return ``S.T @ matrix``: every row reads its bin."""
        bins, signs = self._bins_and_signs(matrix_KD.dtype)
        return matrix_KD.index_select(0, bins) * signs

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the signed bins."""
        return (self._signed_bin_N,)


@dataclass(frozen=True, repr=False)
class CountSketch(AbstractProjection):
    r"""Every row is added, with a random sign, to one of K random bins.

    **Law** The same variance as `Rademacher` at a cost of ``N D`` instead of ``2 K N D``; held: one index per row.

    References:
        M. Charikar, K. Chen and M. Farach-Colton, Theor. Comput. Sci. 312 (2004); as a sketch of gradients,
        arXiv:2604.16324 (which rescales and is biased; this is not).
    """

    def draw(self, like: Tensor, size: int, count: int, generator: torch.Generator | None = None) -> DrawnHash:
        """Draw bins and signs."""
        signed = random.integers(like, 2 * count, (size,), generator=generator)
        return DrawnHash(torch.where(signed < count, signed, count - 1 - signed), count)

    def rebuild(self, tensors: tuple[Tensor, ...], size: int, count: int, like: Tensor) -> DrawnHash:
        """Return the held hash."""
        return DrawnHash(tensors[0], count)

    def input_factor(self, size: int, count: int) -> float:
        """Return ``(N - 1) / K``."""
        return (size - 1) / count

    def weight_variance(self, moments: Moments, size: int, count: int) -> Tensor:
        """Return ``(||X||**2 ||G||**2 + ||G.T X||**2 - 2 sum_n ||x_n||**2 ||g_n||**2) / K``."""
        return (moments.product + moments.gradient - 2 * moments.rows) / count

    def flops(self, size: int, count: int, width: int) -> float:
        """Return 0: additions only, no matrix product."""
        return 0.0

    def saved_bytes(self, size: int, count: int) -> float:
        """Return ``8 N``."""
        return 8.0 * size
