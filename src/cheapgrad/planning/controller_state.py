"""What a controller goes on from: its record of trials, and a saved state, read whole before anything is set."""

from __future__ import annotations

import dataclasses
import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.errors import ControlError
from cheapgrad.planning.controller_curve import KEEPS
from cheapgrad.planning.controller_law import LARGEST_SHIFT
from cheapgrad.planning.controller_memory import recall
from cheapgrad.planning.controller_pass import TOTALS
from cheapgrad.planning.controller_settings import check_keeps, check_settings

# What a whole number of 64 bits holds.
_MOST = 2**63
# Of a weight's gradient: its square is still a number by far.
_LARGEST_FACTOR = 1e60


@dataclass(frozen=True)
class ControlRecord:
    """What the controller knew and did after a comparison of halves.

    Attributes:
        step: optimizer steps made.
        target: ω asked for at this step.
        noise: ω estimated at the budgets that were in force.
        calibration: measured noise over what the draws alone predict: how far noise grows on its way down.
        keep: mean of the keep fractions chosen.
    """

    step: int
    target: float
    noise: float
    calibration: float
    keep: float


@dataclass(frozen=True)
class ControlState:
    """A saved state, checked; its tensors are copies on the CPU. The names are those of `Controller.state_dict`."""

    step: int
    shift: float
    misses: int
    noise: float | None
    log_size: float | None
    totals: Tensor
    rows: dict[str, int]
    curves: dict[str, Tensor]
    layers: dict[str, Tensor]
    followers: frozenset[str]
    factors: dict[str, float]
    history: list[ControlRecord]


def read_state(
    state: Any, settings: Mapping[str, Any], keeps: Mapping[str, float], weights: frozenset[str]
) -> ControlState:
    """Return what a saved state says.

    Args:
        state: what `Controller.state_dict` returned.
        settings: the arguments of the controller that is to go on from it.
        keeps: keep fractions of its layers as converted.
        weights: names of those whose noise it counts in units of an optimizer's steps.

    Raises:
        ControlError: if it is no state, of other arguments or layers, or damaged.
    """
    if not isinstance(state, Mapping):
        raise ControlError(
            f"this is no state of a controller, but a {type(state).__name__}; pass what "
            "controller.state_dict() returned"
        )
    needed = [field.name for field in dataclasses.fields(ControlState)] + ["keeps", "settings"]
    missing = sorted(name for name in needed if name not in state)
    if missing:
        raise ControlError(f"this is no state of a controller: {', '.join(missing)} is missing")
    _check(state, "settings", _is_settings, "a number, or a schedule's numbers, for each argument")
    check_settings(state["settings"], settings)
    _check(state, "keeps", lambda value: _is_mapping(value, _is_number), "a number for each layer")
    check_keeps(state["keeps"], keeps)
    for name, (is_allowed, allowed) in _ALLOWED.items():
        _check(state, name, is_allowed, allowed)
    for name in ("rows", "curves", "layers", "followers"):
        _check(state, name, lambda value: set(value) <= keeps.keys(), f"of the layers {reprlib.repr(list(keeps))} only")
    known = f"of the weights {reprlib.repr(sorted(weights))} only"
    _check(state, "factors", lambda value: set(value) <= weights, known)
    _check(state, "layers", lambda value: value.keys() >= state["curves"].keys(), "of all layers that have a curve")
    return ControlState(
        **{name: state[name] for name in ("step", "shift", "misses", "noise", "log_size")},
        totals=state["totals"].clone().cpu(),
        rows=dict(state["rows"]),
        curves={layer: curve.clone().cpu() for layer, curve in state["curves"].items()},
        layers={layer: pair.clone().cpu() for layer, pair in state["layers"].items()},
        followers=frozenset(state["followers"]),
        factors=dict(state["factors"]),
        history=[ControlRecord(**record) for record in state["history"]],
    )


def _check(state: Mapping[str, Any], name: str, is_allowed: Callable[[Any], bool], allowed: str) -> None:
    if not is_allowed(state[name]):
        raise ControlError(
            f"the state is damaged: {name} must be {allowed}, but is {reprlib.repr(state[name])}; nothing was loaded, "
            "so go on from another state, or without one"
        )


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < _MOST


def _is_number(value: Any) -> bool:
    # Whole numbers too may be too large for a float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_shift(value: Any) -> bool:
    return _is_number(value) and abs(value) <= LARGEST_SHIFT


def _is_number_or_none(value: Any) -> bool:
    return value is None or _is_number(value)


def _is_mapping(value: Any, is_allowed: Callable[[Any], bool]) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and is_allowed(each) for name, each in value.items()
    )


def _is_settings(value: Any) -> bool:
    return _is_mapping(value, lambda each: isinstance(each, bool) or _is_number(each) or _is_mapping(each, _is_number))


def _is_tensor(value: Any, *shape: int) -> bool:
    is_kind = isinstance(value, Tensor) and value.dtype == torch.float64 and not value.is_meta and value.shape == shape
    return is_kind and bool(value.isfinite().all())


def _is_totals(value: Any) -> bool:
    # The calibration is one of them over the other.
    return _is_tensor(value, len(TOTALS)) and float(value[TOTALS.index("predicted_gain")]) > 0


def _is_curve(value: Any) -> bool:
    return _is_tensor(value, 2, len(KEEPS) + 2) and bool(recall(value).isfinite().all())


def _is_record(value: Any) -> bool:
    names = {field.name for field in dataclasses.fields(ControlRecord)}
    return _is_mapping(value, _is_number) and value.keys() == names and _is_count(value["step"])


_FINITE = "a finite number or None"
_ALLOWED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "step": (_is_count, "a whole number of at least 0"),
    "shift": (_is_shift, f"a number from -{LARGEST_SHIFT:g} to {LARGEST_SHIFT:g}"),
    "misses": (_is_count, "a whole number of at least 0"),
    "noise": (_is_number_or_none, _FINITE),
    "log_size": (_is_number_or_none, _FINITE),
    "totals": (_is_totals, f"{len(TOTALS)} finite float64 numbers with predicted_gain above 0"),
    "rows": (lambda value: _is_mapping(value, lambda rows: _is_count(rows, 1)), "a number of rows by layer"),
    "curves": (
        lambda value: _is_mapping(value, _is_curve),
        f"a finite float64 tensor of shape [2, {len(KEEPS) + 2}] by layer, with weights above 0",
    ),
    "layers": (
        lambda value: _is_mapping(value, lambda shares: _is_tensor(shares, 3)),
        "a finite float64 tensor of shape [3] by layer",
    ),
    "followers": (
        lambda value: isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(name, str) for name in value),
        "a list of layers",
    ),
    "factors": (
        lambda value: _is_mapping(value, lambda factor: _is_number(factor) and 0 <= factor <= _LARGEST_FACTOR),
        f"a number from 0 to {_LARGEST_FACTOR:g} by weight",
    ),
    "history": (
        lambda value: isinstance(value, (list, tuple)) and all(_is_record(record) for record in value),
        "a list of records",
    ),
}
