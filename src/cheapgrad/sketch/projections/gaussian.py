"""Gaussian projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cheapgrad.sketch import random
from cheapgrad.sketch.projections._abstract import AbstractProjection, DrawnProjection, Moments


class DrawnMatrix(DrawnProjection):
    """A projection held as a matrix ``[K, N]``, scale included."""

    def __init__(self, matrix_KN: Tensor) -> None:
        super().__init__(matrix_KN.shape[1], matrix_KN.shape[0])
        self._matrix_KN = matrix_KN

    def project(self, matrix_ND: Tensor) -> Tensor:
        """Return ``S @ matrix``."""
        return self._matrix_KN.to(matrix_ND.dtype) @ matrix_ND

    def transpose_project(self, matrix_KD: Tensor) -> Tensor:
        """Return ``S.T @ matrix``."""
        return self._matrix_KN.mT.to(matrix_KD.dtype) @ matrix_KD

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the matrix."""
        return (self._matrix_KN,)


@dataclass(frozen=True, repr=False)
class Gaussian(AbstractProjection):
    r"""S has independent entries ``N(0, 1 / K)``.

    **Law** ``Var dW = (||X||**2 ||G||**2 + ||G.T X||**2) / K``; relative variance of dX ``(N + 1) / K``. The matrix
    itself, ``4 K N`` bytes, must be held: `Rademacher` has lower variance and holds one bit per entry.

    References:
        B. Bershatsky et al., arXiv:2201.13195.
    """

    def draw(self, like: Tensor, size: int, count: int, generator: torch.Generator | None = None) -> DrawnMatrix:
        """Draw the matrix."""
        matrix_KN = random.normal(like, (count, size), generator=generator)
        # Held in single precision whatever the data's: the numbers are random anyway, the bytes are not.
        return DrawnMatrix(matrix_KN / count**0.5)

    def rebuild(self, tensors: tuple[Tensor, ...], size: int, count: int, like: Tensor) -> DrawnMatrix:
        """Return the held matrix."""
        return DrawnMatrix(tensors[0])

    def input_factor(self, size: int, count: int) -> float:
        """Return ``(N + 1) / K``."""
        return (size + 1) / count

    def weight_variance(self, moments: Moments, size: int, count: int) -> Tensor:
        """Return ``(||X||**2 ||G||**2 + ||G.T X||**2) / K``."""
        return (moments.product + moments.gradient) / count

    def flops(self, size: int, count: int, width: int) -> float:
        """Return ``2 K N D``."""
        return 2.0 * size * count * width

    def saved_bytes(self, size: int, count: int) -> float:
        """Return ``4 K N``."""
        return 4.0 * size * count
