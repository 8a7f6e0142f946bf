"""An element-wise activation as a stage."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cheapgrad.ops.activation import Activation
from cheapgrad.ops.activations import sketched_activation
from cheapgrad.ops.chains.stage import AbstractOpenedStage, AbstractStage, KeptRows, Rebuild
from cheapgrad.ops.plan import Plan
from cheapgrad.ops.stored_derivative import StoredDerivative, apply_derivative, store_derivative
from cheapgrad.sketch import AbstractStrategy, StochasticRounding


@dataclass(frozen=True)
class ActivationStage(AbstractStage):
    """``y = f(x)``, entry by entry.

    Attributes:
        activation: f.
        stored: codec for the slope (one bit for the branch of a piecewise linear activation), or None to keep the
            input, from which the output can be computed again.
        keeps_output: whether the record is made from the output instead of the input: autograd keeps nothing else where
            the slope is a function of it.
    """

    activation: Activation
    stored: AbstractStrategy | None = None
    keeps_output: bool = False

    @classmethod
    def for_plan(cls, plan: Plan, features: int, numbers: tuple[float, ...], *options: Any) -> ActivationStage:
        """Return the stage that keeps what a plan says."""
        return cls(Activation.from_options(numbers, *options), plan.stored)

    def options(self) -> tuple[Any, ...]:
        """Return name and what `for_plan` is told besides the plan and the features."""
        return "activation", *self.activation.texts()

    def numbers(self) -> tuple[float, ...]:
        """Return the numbers that `for_plan` is told."""
        return self.activation.numbers()

    def holding_output(self) -> ActivationStage:
        """Return the stage that holds the output, if the slope is a function of it and no codes are asked for."""
        is_enough = self.stored is None and (self.activation.reads_output or self.activation.name == "relu")
        return dataclasses.replace(self, keeps_output=is_enough)

    def alone(self, x: Tensor, parameters: tuple[Tensor | None, ...]) -> Tensor:
        """Return the output, holding the slope in bits."""
        return sketched_activation(x, self.activation, self.stored)

    @property
    def rebuilds_output(self) -> bool:
        """Yes, in one pass over the kept rows, where the input is held; a slope does not give the output."""
        return self.stored is None

    def forward(self, x: Tensor, parameters: tuple[Tensor | None, ...]) -> Tensor:
        """Return ``f(x)``."""
        return self.activation.forward(x)

    def record(self, x: Tensor, parameters: tuple[Tensor | None, ...], is_rebuilt: bool) -> tuple[Tensor, ...]:
        """Return the input, unless the stage before rebuilds it, or the output; or the codes of the slope."""
        if self.stored is None:
            return () if is_rebuilt else (x,)
        y = x if self.keeps_output or not self.activation.reads_output else self.activation.forward(x)
        return store_derivative(x, y, self.activation, self.stored).tensors

    def open(
        self,
        record: tuple[Tensor, ...],
        parameters: tuple[Tensor | None, ...],
        rows: KeptRows,
        rebuild: Rebuild | None,
    ) -> AbstractOpenedStage:
        """Take the kept rows."""
        if isinstance(self.stored, StochasticRounding):
            bits = self.stored.bits if self.activation.slope_kind == "smooth" else 1
            stored = StoredDerivative(self.activation, bits, rows.count, 0, record, self.stored.fused)
            return _OpenedSlope(stored, rows.index_K)
        return _OpenedActivation(
            self, rebuild() if rebuild is not None and not record else rows.take_visibly(record[0])
        )


class _OpenedSlope(AbstractOpenedStage):
    def __init__(self, stored: StoredDerivative, index_K: Tensor | None) -> None:
        self._stored = stored
        self._index_K = index_K

    def output(self) -> Tensor:
        """Refuse: what follows has codes of its own."""
        raise RuntimeError("the slope of an activation does not give its output")

    def pull_back(self, grad_KO: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
        """Return the cotangent times the decoded slope."""
        stored = dataclasses.replace(self._stored, features=grad_KO.shape[1])
        return apply_derivative(stored, grad_KO, self._index_K), ()


class _OpenedActivation(AbstractOpenedStage):
    def __init__(self, stage: ActivationStage, held_KI: Tensor) -> None:
        self._activation = stage.activation
        self._held_KI = held_KI
        self._output_KI = held_KI if stage.keeps_output else None

    def output(self) -> Tensor:
        """Return ``f(x)``, computed once."""
        if self._output_KI is None:
            self._output_KI = self._activation.forward(self._held_KI)
        return self._output_KI

    def pull_back(self, grad_KO: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
        """Return ``f'(x) * G``, as PyTorch computes it."""
        held_KI = self._held_KI
        output_KI = self.output() if self._activation.reads_output else held_KI
        return self._activation.backward(grad_KO.to(held_KI.dtype), held_KI, output_KI), ()
