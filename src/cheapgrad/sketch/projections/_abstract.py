"""What every random projection promises."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from cheapgrad.sketch.operands import AbstractStoredMatrix
from cheapgrad.sketch.value import Value


@dataclass(frozen=True)
class Moments:
    """The sums a projection's variance of dW is made of.

    Attributes:
        product: ``||X||**2 ||G||**2``.
        rows: ``sum_n ||x_n||**2 ||g_n||**2``.
        gradient: ``||G.T X||**2``.
    """

    product: Tensor
    rows: Tensor
    gradient: Tensor


class DrawnProjection(abc.ABC):
    """A drawn projection S of an axis of length `size` to `count` coordinates, with ``E[S.T @ S] = identity``."""

    def __init__(self, size: int, count: int) -> None:
        self.size = size
        self.count = count

    @abc.abstractmethod
    def project(self, matrix_ND: Tensor) -> Tensor:
        """Return ``S @ matrix``."""

    @abc.abstractmethod
    def transpose_project(self, matrix_KD: Tensor) -> Tensor:
        """Return ``S.T @ matrix``."""

    @abc.abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """Return what must be saved to apply the same S again."""

    def apply(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Return the projected tensor (only rows are projected)."""
        return self.project(tensor)

    def gather(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Return the projected partner: a projection carries its scale symmetrically."""
        return self.project(tensor)

    def gather_rows(self, stored: AbstractStoredMatrix) -> Tensor:
        """Return the projected stored matrix."""
        return self.project(stored.dense())

    def lift(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Return the transpose of the projection."""
        return self.transpose_project(tensor)


@dataclass(frozen=True, repr=False)
class AbstractProjection(Value, abc.ABC):
    """A kind of random projection."""

    @abc.abstractmethod
    def draw(self, like: Tensor, size: int, count: int, generator: torch.Generator | None = None) -> DrawnProjection:
        """Draw a projection of an axis of length `size` to `count` coordinates."""

    @abc.abstractmethod
    def rebuild(self, tensors: tuple[Tensor, ...], size: int, count: int, like: Tensor) -> DrawnProjection:
        """Return the projection that `DrawnProjection.tensors` described."""

    @abc.abstractmethod
    def input_factor(self, size: int, count: int) -> float:
        """Return ``E ||S.T S M - M||**2 / ||M||**2``."""

    @abc.abstractmethod
    def weight_variance(self, moments: Moments, size: int, count: int) -> Tensor:
        """Return ``E ||(S G).T (S X) - G.T X||**2``."""

    @abc.abstractmethod
    def flops(self, size: int, count: int, width: int) -> float:
        """Return the FLOPs of projecting a ``[size, width]`` matrix."""

    @abc.abstractmethod
    def saved_bytes(self, size: int, count: int) -> float:
        """Return the bytes of `DrawnProjection.tensors`."""
