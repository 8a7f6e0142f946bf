"""Dropout as a stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cheapgrad.ops.chains.stage import AbstractOpenedStage, AbstractStage, KeptRows, Rebuild
from cheapgrad.ops.dropout import Dropping, sketched_dropout
from cheapgrad.ops.plan import Plan
from cheapgrad.sketch import AbstractStrategy


@dataclass(frozen=True)
class DropoutStage(AbstractStage):
    """``y = x * mask / (1 - p)``; its only parameter is the mask that was drawn, in packed bits ``[..., ceil(I / 8)]``.

    Attributes:
        dropping: the chance of an entry to be dropped.
        stored: a codec, if the stages around hold codes: nothing is then kept of the input; or None to keep it, so that
            the output can be computed again.
    """

    dropping: Dropping
    stored: AbstractStrategy | None = None

    @classmethod
    def for_plan(cls, plan: Plan, features: int, numbers: tuple[float, ...]) -> DropoutStage:
        """Return the stage that keeps what a plan says."""
        return cls(Dropping(numbers[0]), plan.stored)

    def options(self) -> tuple[Any, ...]:
        """Return name and what `for_plan` is told besides the plan and the features."""
        return ("dropout",)

    def numbers(self) -> tuple[float, ...]:
        """Return the numbers that `for_plan` is told."""
        return (self.dropping.p,)

    def alone(self, x: Tensor, parameters: tuple[Tensor | None, ...]) -> Tensor:
        """Return the output, holding the mask in bits."""
        return sketched_dropout(x, self.dropping, _mask_of(parameters))

    @property
    def rebuilds_output(self) -> bool:
        """Yes, in one pass over the kept rows, where the input is held or rebuilt."""
        return self.stored is None

    def forward(self, x: Tensor, parameters: tuple[Tensor | None, ...]) -> Tensor:
        """Return the input with entries dropped."""
        return self.dropping.forward(x, _mask_of(parameters))

    def record(self, x: Tensor, parameters: tuple[Tensor | None, ...], is_rebuilt: bool) -> tuple[Tensor, ...]:
        """Return the input, unless the stage before rebuilds it or nobody asks for the output again."""
        return () if is_rebuilt or self.stored is not None else (x,)

    def open(
        self,
        record: tuple[Tensor, ...],
        parameters: tuple[Tensor | None, ...],
        rows: KeptRows,
        rebuild: Rebuild | None,
    ) -> AbstractOpenedStage:
        """Take the mask of the kept rows."""
        input_KI = rebuild if not record else lambda: rows.take_visibly(record[0])
        return _OpenedDropout(self.dropping, rows.take(_mask_of(parameters)), input_KI)


class _OpenedDropout(AbstractOpenedStage):
    def __init__(self, dropping: Dropping, packed: Tensor, input_KI: Rebuild | None) -> None:
        self._dropping = dropping
        self._packed = packed
        self._input_KI = input_KI

    def output(self) -> Tensor:
        """Return the output, computed again."""
        if self._input_KI is None:
            raise RuntimeError("a dropout that keeps nothing of its input does not give its output")
        return self._dropping.forward(self._input_KI(), self._packed)

    def pull_back(self, grad_KO: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
        """Return the cotangent with the same entries dropped."""
        return self._dropping.scale(grad_KO, self._packed), (None,)


def _mask_of(parameters: tuple[Tensor | None, ...]) -> Tensor:
    (packed,) = parameters
    if packed is None:
        raise RuntimeError("a dropout stage has a mask")
    return packed
