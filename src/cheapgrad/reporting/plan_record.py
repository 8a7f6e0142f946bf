"""What a report reads of a plan: which layer takes which strategy, and what that costs and adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cheapgrad.sketch.value import from_dict as read_strategy


@dataclass(frozen=True)
class PlanStep:
    """What one training step costs.

    Attributes:
        saved_bytes: held for backward.
        forward_flops: of the forward pass.
        backward_flops: of the backward pass.
        noise_fraction: added variance divided by that of the mini-batch gradient.
    """

    saved_bytes: float
    forward_flops: float
    backward_flops: float
    noise_fraction: float


@dataclass(frozen=True)
class PlanLayer:
    """What one layer takes.

    Attributes:
        name: qualified name.
        stored: strategy for what is stored, as text, or None.
        cotangent: strategy for the cotangent, as text, or None.
        noise_fraction: what its sketches add, divided by the variance of the mini-batch gradient; modelled.
    """

    name: str
    stored: str | None
    cotangent: str | None
    noise_fraction: float


@dataclass(frozen=True)
class PlanRecord:
    """A plan.

    Attributes:
        budgets: what was asked for.
        exact: the step without sketches.
        predicted: the step with the plan; its noise is modelled.
        layers: those that take a strategy.
        remarks: what else a reader has to know.
    """

    budgets: Mapping[str, Any]
    exact: PlanStep
    predicted: PlanStep
    layers: tuple[PlanLayer, ...]
    remarks: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PlanRecord:
        """Return what a plan's ``to_dict`` says; what reports do not show is left out."""
        return cls(
            budgets=dict(data["budgets"]),
            exact=_read_step(data["exact"]),
            predicted=_read_step(data["predicted"]),
            layers=tuple(
                PlanLayer(
                    layer["name"], _read_text(layer["stored"]), _read_text(layer["cotangent"]), layer["noise_fraction"]
                )
                for layer in data["layers"]
            ),
            remarks=tuple(data.get("remarks", ())),
        )


def _read_step(data: Mapping[str, Any]) -> PlanStep:
    return PlanStep(*(data[key] for key in ("saved_bytes", "forward_flops", "backward_flops", "noise_fraction")))


def _read_text(strategy: Mapping[str, Any] | None) -> str | None:
    return None if strategy is None else repr(read_strategy(dict(strategy)))
