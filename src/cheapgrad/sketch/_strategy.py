"""What every strategy promises to the operations that use it."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.errors import PlacementError, ShapeError
from cheapgrad.sketch.law import Law, LayerTensors, Variance
from cheapgrad.sketch.moment import Moment
from cheapgrad.sketch.operands import AbstractStoredMatrix, DenseMatrix, Operands
from cheapgrad.sketch.value import Value


class AbstractDrawnCotangent(abc.ABC):
    """A drawn stand-in for the cotangent G ``[N, O]``, ready to be multiplied."""

    @abc.abstractmethod
    def dense(self) -> Tensor:
        """Return the stand-in as a matrix ``[N, O]``."""

    @abc.abstractmethod
    def input_gradient(self, weight_OI: Tensor) -> Tensor:
        """Return ``stand-in @ W``, shape ``[N, I]``."""

    @abc.abstractmethod
    def weight_gradient(self, stored: AbstractStoredMatrix) -> Tensor:
        """Return ``stand-in.T @ X``, shape ``[O, I]``."""


@dataclass(frozen=True, repr=False)
class AbstractStrategy(Value, abc.ABC):
    """An unbiased stand-in for what is stored of X, for the cotangent G, or for either.

    Strategies are immutable values: validated when built, comparable, printable, with nothing drawn yet.
    """

    @property
    @abc.abstractmethod
    def law(self) -> Law:
        """Bias, variance and cost of this strategy."""

    @property
    def is_exact(self) -> bool:
        """Whether the budget is full, so that the layer runs PyTorch's own code."""
        return False

    def check_placement(self, moment: Moment) -> None:
        """Raise `PlacementError`, with the reason, if the strategy has no meaning at `moment`."""
        if moment not in self.law.moments:
            allowed = " or ".join(f"{choice.value}=" for choice in self.law.moments)
            raise PlacementError(
                f"{self!r} has no meaning in {moment.value}=: {self.misplacement_reason}; use it in {allowed}"
            )

    @property
    def misplacement_reason(self) -> str:
        """Why the strategy cannot act at the other moment."""
        return "it works at both moments"

    def check_layer(self, inputs: int, outputs: int, moment: Moment) -> None:
        """Raise `BudgetError` if the budget does not fit a layer of these sizes."""

    def new_memory(self) -> Any:
        """Return fresh per-layer memory (running estimates), or None if the strategy keeps none."""
        return None

    def store(self, operands: Operands, memory: Any = None) -> tuple[Tensor, ...]:
        """Return what is kept of X, as plain tensors (forward time)."""
        raise PlacementError(f"{self!r} cannot be stored: {self.misplacement_reason}")

    def variance_with_memory(self, tensors: LayerTensors, moment: Moment, memory: Any) -> Variance:
        """Return the law's variance, given what a layer remembers (running estimates, a held basis)."""
        return self.law._variance(tensors, moment)

    def observe(self, cotangent_NO: Tensor, examples: int, memory: Any) -> None:
        """Let running estimates take in a cotangent (backward time)."""

    def restore(self, kept: tuple[Tensor, ...], rows: int, inputs: int, dtype: torch.dtype) -> AbstractStoredMatrix:
        """Return the kept tensors as a stand-in for X (backward time)."""
        raise PlacementError(f"{self!r} cannot be stored: {self.misplacement_reason}")

    def draw(self, operands: Operands, memory: Any = None) -> AbstractDrawnCotangent:
        """Return a drawn stand-in for the cotangent (backward time)."""
        raise PlacementError(f"{self!r} cannot sketch a cotangent: {self.misplacement_reason}")


def as_stack(matrix: Tensor) -> Tensor:
    """Return ``[N, D]`` as ``[1, N, D]``, in float64; leave ``[Q, N, D]`` stacked."""
    return (matrix if matrix.dim() == 3 else matrix.unsqueeze(0)).double()


def stacked(tensors: LayerTensors) -> tuple[Tensor, Tensor]:
    """Return X and G in float64 with their group axis; raise `ShapeError` if their rows do not match."""
    stored_QNI, cotangent_QNO = as_stack(tensors.stored_QNI), as_stack(tensors.cotangent_QNO)
    if stored_QNI.shape[:2] != cotangent_QNO.shape[:2]:
        raise ShapeError(
            f"stored and cotangent must have the same rows, but got shapes {tuple(tensors.stored_QNI.shape)} and "
            f"{tuple(tensors.cotangent_QNO.shape)}"
        )
    return stored_QNI, cotangent_QNO


def flat(stack_QND: Tensor) -> Tensor:
    """Return a stack of groups as one matrix ``[N, Q * D]``, the way a layer holds it."""
    return stack_QND.transpose(0, 1).flatten(1)


def operands_for(tensors: LayerTensors, moment: Moment) -> Operands:
    """Return what a draw at `moment` would see of these tensors."""
    stored_QNI, cotangent_QNO = stacked(tensors)
    return Operands(
        moment=moment,
        stored=DenseMatrix(flat(stored_QNI)),
        cotangent_NO=flat(cotangent_QNO) if moment is Moment.COTANGENT else None,
        weight_OI=tensors.weight_OI.double() if tensors.weight_OI is not None and moment is Moment.COTANGENT else None,
        examples=tensors.examples,
        predicted_norm_N=tensors.predicted_norm_N,
    )


def zero(like: Tensor) -> Tensor:
    """Return a 0-dim float64 zero on the device of `like`."""
    return torch.zeros((), dtype=torch.float64, device=like.device)
