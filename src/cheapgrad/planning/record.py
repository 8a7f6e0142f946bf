"""The plan: which layer takes which strategy, and what that is predicted to cost and to add."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from cheapgrad.convert import Rule
from cheapgrad.convert.layer_record import describe_layer
from cheapgrad.convert.wrappers import unwrap
from cheapgrad.cost.units import format_bytes, format_flops
from cheapgrad.errors import CheapgradError, RecordError, describe_value
from cheapgrad.field_types import find_misfit
from cheapgrad.planning.batches import FEWEST_FOR_ERRORS, spare_factor
from cheapgrad.planning.held import HeldPart
from cheapgrad.planning.units import name_units
from cheapgrad.sketch import AbstractStrategy
from cheapgrad.sketch.value import from_dict

KIND, VERSION = "cheapgrad.plan", 1
# What building a plan from wrong parts raises.
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class PlanFigures:
    """What one training step costs.

    Attributes:
        saved_bytes: held for backward when the forward pass is over, by the whole model, the batch included.
        forward_flops: of the whole forward pass.
        backward_flops: of the whole backward pass.
        noise_fraction: added variance of the gradient of all parameters, divided by that of the mini-batch gradient.
    """

    saved_bytes: float
    forward_flops: float
    backward_flops: float
    noise_fraction: float


@dataclass(frozen=True)
class PlannedLayer:
    """What one layer takes.

    Attributes:
        name: qualified name.
        stored: strategy for what is kept of its input, or None.
        cotangent: strategy for its cotangent, or None.
        drawn_at: the layer at whose output the rows are drawn, where several layers share one draw; else None.
        recompute: whether its output is computed again for others that would hold it, as attention its queries.
        noise_fraction: what this layer's sketches add, divided by the variance of the mini-batch gradient; a draw that
            is shared counts where it is drawn. Modelled, with all other layers exact; layers whose codes are chosen
            together, as those of one input or one block, have equal shares of what the codes add together.
        passed_down_share: the part of it that is in the parameters of layers below. Modelled.
        module: its type and the shapes of its parameters, such as ``"Linear(weight [64, 32], bias [64])"``; empty where
            that is not known.
    """

    name: str
    stored: AbstractStrategy | None = None
    cotangent: AbstractStrategy | None = None
    drawn_at: str | None = None
    recompute: bool = False
    noise_fraction: float = 0.0
    passed_down_share: float = 0.0
    module: str = ""


@dataclass(frozen=True)
class Plan:
    """What `cheapgrad.plan` returns; ``cheapgrad.approximate(model, plan)`` carries it out.

    Attributes:
        budgets: what was asked for, as it was written.
        exact: the step without sketches; measured.
        predicted: the step with the plan. Bytes and FLOPs were counted in one step while planning; noise is modelled
            from the laws and from drawn backward passes.
        layers: the layers that take a strategy.
        noise_standard_error: of `predicted.noise_fraction`: of laws and draws, and of how noise and mini-batch variance
            differ from batch to batch (the latter from four batches on; a remark says where it is missing).
        separate_noise_fraction: the noise if no layer's sketch met the noise of another: what the choice minimised.
        batches: how many batches the mini-batch variance was measured on.
        skip_small: whether layers too small to pay were left alone.
        remarks: what else a reader has to know.
        held: what makes up the bytes of `exact` and of `predicted`, by module and operation; none in a plan that was
            written before these were noted.
        in_optimizer_units: whether every parameter's noise counts by what an optimizer divides its gradient by.
    """

    budgets: Mapping[str, str | float]
    exact: PlanFigures
    predicted: PlanFigures
    layers: tuple[PlannedLayer, ...]
    noise_standard_error: float
    separate_noise_fraction: float
    batches: int
    skip_small: bool = True
    remarks: tuple[str, ...] = ()
    held: tuple[HeldPart, ...] = ()
    in_optimizer_units: bool = False

    @property
    def rules(self) -> tuple[Rule, ...]:
        """One rule for each layer."""
        return tuple(
            Rule(_literal(layer.name), stored=layer.stored, cotangent=layer.cotangent, recompute=layer.recompute)
            for layer in self.layers
        )

    def find_differences(self, model: nn.Module) -> list[str]:
        """Return how layers of a model differ from those that the plan was made for, in words.

        Args:
            model: not converted yet; layers that it does not have are left to `approximate`, which refuses them.
        """
        there = dict(unwrap(model).named_modules(remove_duplicate=False))
        pairs = [(layer, describe_layer(there[layer.name])) for layer in self.layers if layer.name in there]
        return [
            f"layer {layer.name!r} is {now}, and was {layer.module} when the plan was made"
            for layer, now in pairs
            if layer.module not in ("", now)
        ]

    @property
    def noise_interval(self) -> tuple[float, float]:
        """Where the noise over many batches like these is expected with a chance of eight in ten.

        From the standard error, with quantiles of Student's t for as many batches. It is about the mean over many
        batches; that of as few others as were planned with has an error of its own, as large again. From fewer than
        four batches it covers the error of laws and draws alone. A noise ceiling is not below its upper end.
        """
        noise = self.predicted.noise_fraction
        factor = spare_factor(self.noise_standard_error / noise, self.batches) if noise else 1.0
        return noise / factor, noise * factor

    @property
    def saved_bytes_fraction(self) -> float:
        """Bytes held, divided by those of the exact step."""
        return _share(self.predicted.saved_bytes, self.exact.saved_bytes)

    @property
    def backward_flops_fraction(self) -> float:
        """Backward FLOPs, divided by those of the exact step."""
        return _share(self.predicted.backward_flops, self.exact.backward_flops)

    @property
    def step_flops_fraction(self) -> float:
        """FLOPs of forward and backward pass, divided by those of the exact step."""
        exact, planned = (figures.forward_flops + figures.backward_flops for figures in (self.exact, self.predicted))
        return _share(planned, exact)

    @property
    def cost_times_noise(self) -> float:
        """``c (1 + ω)``, c being the larger saving's share: below 1, the plan beats a smaller batch of equal cost.

        For memory c is the share of the bytes, for time the share of the step's FLOPs, forward pass included. Where
        both were asked for, a smaller batch would have to match the smaller of the two.
        """
        return self._batch_share * (1 + self.predicted.noise_fraction)

    @property
    def smaller_batch_is_better(self) -> bool:
        """Whether a smaller batch of equal cost would add no more noise, where noise decides: ``c (1 + ω) ≥ 1``."""
        return bool(self.layers) and self.cost_times_noise >= 1

    @property
    def _batch_share(self) -> float:
        shares = [self.saved_bytes_fraction] if "memory" in self.budgets else []
        shares += [self.step_flops_fraction] if "flops" in self.budgets else []
        return min(shares or [self.saved_bytes_fraction, self.step_flops_fraction])

    @property
    def advice(self) -> str:
        """Whether to follow the plan, in a sentence."""
        share, noise = self._batch_share, self.predicted.noise_fraction
        if not self.layers:
            return "the exact step keeps the budget: nothing is to be done"
        figures = f"c(1 + ω) = {share:.3g} × {1 + noise:.3g} = {self.cost_times_noise:.3g}"
        if not self.smaller_batch_is_better:
            return f"{figures} is below 1: the plan beats a smaller batch of equal cost where noise decides"
        return (
            f"{figures} is at least 1: a batch of {share:.0%} of the size costs as much and adds "
            f"{1 / share - 1:.3g} times the mini-batch variance instead of {noise:.3g}; take the smaller batch"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, marked as what it is."""
        layers = [
            {
                **dataclasses.asdict(dataclasses.replace(layer, stored=None, cotangent=None)),
                "stored": None if layer.stored is None else layer.stored.to_dict(),
                "cotangent": None if layer.cotangent is None else layer.cotangent.to_dict(),
            }
            for layer in self.layers
        ]
        return {
            "kind": KIND,
            "version": VERSION,
            "budgets": dict(self.budgets),
            "exact": dataclasses.asdict(self.exact),
            "predicted": dataclasses.asdict(self.predicted),
            "layers": layers,
            "noise_standard_error": self.noise_standard_error,
            "separate_noise_fraction": self.separate_noise_fraction,
            "batches": self.batches,
            "skip_small": self.skip_small,
            "remarks": list(self.remarks),
            "held": [dataclasses.asdict(part) for part in self.held],
            "in_optimizer_units": self.in_optimizer_units,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Return the plan that `to_dict` was called on.

        Args:
            data: what it returned, also after a journey through JSON.

        Raises:
            RecordError: if it is no plan, or lacks a part, or has one of another type or out of its range.
        """
        marks = (data.get("kind"), data.get("version")) if isinstance(data, Mapping) else (type(data).__name__, None)
        if marks != (KIND, VERSION):
            raise RecordError(
                f"this is no plan: its kind and version should be {KIND!r} and {VERSION}, but are {marks[0]!r} and "
                f"{marks[1]!r}"
            )
        try:
            plan = _build(data)
        except _DAMAGE as error:
            # The library's own errors say what is wrong; of the others the type is half of what they say.
            kind = "" if isinstance(error, CheapgradError) else f"{type(error).__name__}: "
            raise RecordError(f"this plan is damaged: {kind}{error}") from error
        misfit = find_misfit(plan, cls) or _find_out_of_range(plan)
        if misfit is not None:
            raise RecordError(f"this plan is damaged: {misfit}; plan again, or write it again with to_json")
        return plan

    def to_json(self) -> str:
        """Return the plan as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan that `to_json` wrote.

        Args:
            text: JSON.

        Raises:
            RecordError: if the text is no JSON, or no plan, or one that is damaged.
        """
        try:
            data = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise RecordError(f"this is no JSON: {error}") from error
        return cls.from_dict(data)

    def table(self) -> str:
        """Return the plan as a table, layer by layer, with its totals."""
        from cheapgrad.planning.table import render_plan

        return render_plan(self)

    def __str__(self) -> str:
        return self.table()

    @property
    def noise_units(self) -> str:
        """What a figure of noise is a multiple of, in words."""
        return f"mini-batch variance{name_units(self.in_optimizer_units)}"

    def describe_totals(self) -> list[str]:
        """Return a line for each of bytes, FLOPs and noise."""
        exact, planned = self.exact, self.predicted
        low, high = self.noise_interval
        covers = "" if self.batches >= FEWEST_FOR_ERRORS else ", by the error of laws and draws alone"
        return [
            f"held for backward  {format_bytes(exact.saved_bytes)} → {format_bytes(planned.saved_bytes)} "
            f"({self.saved_bytes_fraction:.1%}; counted)",
            f"backward FLOPs     {format_flops(exact.backward_flops)} → {format_flops(planned.backward_flops)} "
            f"({self.backward_flops_fraction:.1%}; counted)",
            f"added noise        {planned.noise_fraction:.3g} ± {self.noise_standard_error:.1g} of the "
            f"{self.noise_units} (modelled from {self.batches} batches; {low:.2g} to {high:.2g} for eight in "
            f"ten{covers})",
        ]


def _literal(name: str) -> str:
    """Return a pattern that matches this name only."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _find_out_of_range(plan: Plan) -> str | None:
    """Return what no plan that was made says, or None."""
    for part in ("exact", "predicted"):
        for name, value in dataclasses.asdict(getattr(plan, part)).items():
            if not _is_size(value):
                return f"{part}.{name} is {value!r:.60}, but is a finite number of at least 0"
    for layer in plan.layers:
        for name in ("noise_fraction", "passed_down_share"):
            value = getattr(layer, name)
            if not _is_size(value):
                return f"{name} of layer {layer.name!r} is {value!r:.60}, but is a finite number of at least 0"
    for name, least in (("noise_standard_error", 0), ("separate_noise_fraction", 0), ("batches", 2)):
        value = getattr(plan, name)
        if not value >= least:
            return f"{name} is {value!r}, but is at least {least}"
    wrong_bytes = _find_wrong_bytes(plan)
    if wrong_bytes is not None:
        return wrong_bytes
    names = [layer.name for layer in plan.layers]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        return f"layer {twice!r} stands there twice"
    stray = next((layer for layer in plan.layers if layer.drawn_at not in (None, *names)), None)
    return f"layer {stray.name!r} is drawn at {stray.drawn_at!r}, which is no layer of it" if stray else None


def _is_size(value: float) -> bool:
    # Whole numbers may be too large for a float.
    return 0 <= value <= sys.float_info.max


def _find_wrong_bytes(plan: Plan) -> str | None:
    """Return which parts hold no possible number of bytes, or not those of the whole step together."""
    for position, part in enumerate(plan.held):
        if min(part.exact_bytes, part.planned_bytes) < 0:
            return f"held[{position}] is {part}, but bytes are at least 0"
    for name, whole, parts in (
        ("exact", plan.exact.saved_bytes, [part.exact_bytes for part in plan.held]),
        ("predicted", plan.predicted.saved_bytes, [part.planned_bytes for part in plan.held]),
    ):
        if parts and sum(parts) != whole:
            return f"{name}.saved_bytes is {whole!r}, but the parts in held have {sum(parts)} bytes"
    return None


def _build(data: Mapping[str, Any]) -> Plan:
    """Return the plan; whatever is wrong with the data raises one of `_DAMAGE`, or is left for `find_misfit`."""
    plain = ("noise_standard_error", "separate_noise_fraction", "batches", "skip_small")
    return Plan(
        budgets=data["budgets"],
        exact=PlanFigures(**data["exact"]),
        predicted=PlanFigures(**data["predicted"]),
        layers=tuple(_build_layer(layer) for layer in _entries(data, "layers")),
        remarks=tuple(_entries(data, "remarks")),
        held=tuple(HeldPart(**part) for part in _entries(data, "held")) if "held" in data else (),
        in_optimizer_units=data.get("in_optimizer_units", False),
        **{key: data[key] for key in plain},
    )


def _entries(data: Mapping[str, Any], key: str) -> Sequence[Any]:
    """Return a list; of a text, `tuple` would make its letters, and of an object its names."""
    if not isinstance(data[key], (list, tuple)):
        raise TypeError(f"{key} must be a list, but is {describe_value(data[key])}")
    return data[key]


def _build_layer(data: Mapping[str, Any]) -> PlannedLayer:
    return PlannedLayer(**{**data, **{key: _strategy(data, key) for key in ("stored", "cotangent")}})


def _strategy(data: Mapping[str, Any], key: str) -> Any:
    value = data[key]
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(f"{key} must be an object with a type, or null, but is {describe_value(value)}")
    return from_dict(dict(value))
