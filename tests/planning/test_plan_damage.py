"""A plan from a file is whole, or refused by what is wrong with it."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from dataclasses import dataclass
from typing import Any

import pytest

from cheapgrad import sketch
from cheapgrad.errors import CheapgradError, RecordError
from cheapgrad.planning import HeldPart, Plan, PlanFigures, PlannedLayer
from cheapgrad.planning.controller_trial import TrialDesign
from cheapgrad.sketch import AbstractDesign, AbstractScore, AbstractStrategy, RowSample, StochasticRounding, Systematic

EXACT, PREDICTED = PlanFigures(1000, 100, 200, 0.0), PlanFigures(500, 100, 100.5, 0.25)
LAYERS = (
    PlannedLayer("0", stored=StochasticRounding(4)),
    PlannedLayer("2", cotangent=RowSample(0.5, design=Systematic()), drawn_at="2", noise_fraction=0.25),
)
HELD = (HeldPart("0", "aten::addmm", 900, 400), HeldPart("(loss)", "aten::nll_loss", 100, 100))
PLAN = Plan(
    {"memory": "60 %", "flops": 0.6}, EXACT, PREDICTED, LAYERS, 0.01, 0.25, 4, remarks=("few batches",), held=HELD
)


def damaged(path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    data = copy.deepcopy(PLAN.to_dict())
    holder: Any = data
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return data


def test_whole_plan_is_read() -> None:
    assert Plan.from_json(PLAN.to_json()) == PLAN
    assert Plan.from_json(PLAN.to_json().encode()) == PLAN  # type: ignore[arg-type] - json reads bytes too


def test_plan_from_before_parts_were_noted_is_read() -> None:
    data = PLAN.to_dict()
    del data["held"]
    assert Plan.from_dict(data) == dataclasses.replace(PLAN, held=())


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (None, TypeError),
        (b"\xff\xfe\x00", UnicodeDecodeError),
        ("[" * 200_000, RecursionError),
        ("no json", json.JSONDecodeError),
    ],
    ids=["None", "bytes", "deep", "text"],
)
def test_what_is_no_json_is_named(text: Any, cause: type[Exception]) -> None:
    with pytest.raises(RecordError, match="this is no JSON: ") as caught:
        Plan.from_json(text)
    assert isinstance(caught.value.__cause__, cause)


def test_strategies_nested_too_deeply_are_named() -> None:
    nested: dict[str, Any] = {"type": "RowSample"}
    for _ in range(20_000):
        nested = {"type": "RowSample", "design": nested}
    data = {**PLAN.to_dict(), "layers": [{"name": "0", "stored": nested, "cotangent": None}]}
    with pytest.raises(RecordError, match="this plan is damaged: RecursionError"):
        Plan.from_dict(data)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("budgets",), "ab", "budgets is 'ab', not Mapping"),
        (("budgets",), [["memory", 0.5]], "budgets is [['memory', 0.5]], not Mapping"),
        (("budgets", "memory"), None, "budgets['memory'] is None, not str"),
        (("layers",), {}, "layers must be a list, but is a dict"),
        (("layers", 0), "0", "is not a mapping"),
        (("layers", 0, "name"), 5, "layers[0].name is 5, not str"),
        (("layers", 1, "cotangent"), "RowSample", "must be an object with a type, or null, but is a str 'RowSample'"),
        (("layers", 1, "cotangent"), [], "must be an object with a type, or null, but is a list of 0"),
        (("layers", 1, "cotangent", "type"), ["RowSample"], "unhashable"),
        (("layers", 1, "cotangent"), {"type": "Systematic", "permute": True}, "layers[1].cotangent is Systematic("),
        (("layers", 1, "drawn_at"), 2, "layers[1].drawn_at is 2, not str"),
        (("layers", 1, "recompute"), "no", "layers[1].recompute is 'no', not bool"),
        (("layers", 1, "noise_fraction"), True, "layers[1].noise_fraction is True, not float"),
        (("layers", 1, "beside"), 1, "unexpected keyword argument 'beside'"),
        (("exact",), None, "must be a mapping, not NoneType"),
        (("exact", "saved_bytes"), "1000", "exact.saved_bytes is '1000', not float"),
        (("predicted", "saved_bytes"), None, "predicted.saved_bytes is None, not float"),
        (("batches",), "4", "batches is '4', not int"),
        (("batches",), None, "batches is None, not int"),
        (("noise_standard_error",), "0.01", "noise_standard_error is '0.01', not float"),
        (("noise_standard_error",), None, "noise_standard_error is None, not float"),
        (("separate_noise_fraction",), [], "separate_noise_fraction is [], not float"),
        (("skip_small",), 1, "skip_small is 1, not bool"),
        (("remarks",), "few batches", "remarks must be a list, but is a str 'few batches'"),
        (("remarks", 0), 3, "remarks[0] is 3, not str"),
        (("predicted", "noise_fraction"), math.nan, "predicted.noise_fraction is nan, but is a finite number of at"),
        (("predicted", "saved_bytes"), -1, "predicted.saved_bytes is -1, but is a finite number of at least 0"),
        (("layers", 1, "noise_fraction"), math.inf, "is inf, but is a finite number of at least 0"),
        (("layers", 1, "passed_down_share"), -1, "is -1, but is a finite number of at least 0"),
        (("exact", "saved_bytes"), 10**400, "but is a finite number of at least 0"),
        (("batches",), 1, "batches is 1, but is at least 2"),
        (("noise_standard_error",), -1.0, "noise_standard_error is -1.0, but is at least 0"),
        (("held",), {}, "held must be a list, but is a dict"),
        (("held", 0), 5, "must be a mapping, not int"),
        (("held", 0, "module"), None, "held[0].module is None, not str"),
        (("held", 0, "exact_bytes"), 900.5, "held[0].exact_bytes is 900.5, not int"),
        (("held", 1, "planned_bytes"), -1, "held[1] is HeldPart(module='(loss)'"),
        (("held", 0, "exact_bytes"), 901, "exact.saved_bytes is 1000, but the parts in held have 1001 bytes"),
        (("held", 1, "planned_bytes"), 99, "predicted.saved_bytes is 500, but the parts in held have 499 bytes"),
        (("layers", 0, "name"), "2", "layer '2' stands there twice"),
        (("layers", 1, "drawn_at"), "x", "layer '2' is drawn at 'x', which is no layer of it"),
    ],
)
def test_damage_is_named(path: tuple[str | int, ...], value: Any, words: str) -> None:
    with pytest.raises(RecordError, match=r"this plan is damaged: .*" + re.escape(words)):
        Plan.from_json(json.dumps(damaged(path, value)))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("layers", 1, "cotangent", "keep"), 7, "keep must be in (0, 1], but got 7"),
        (("layers", 1, "cotangent", "keep"), None, "keep must be a number in (0, 1], but got None"),
        (("layers", 1, "cotangent", "kep"), 0.5, "RowSample has no field 'kep'"),
        (("layers", 1, "cotangent", "type"), "RowSampel", "unknown type 'RowSampel'; did you mean 'RowSample'"),
        (("layers", 0, "stored", "bits"), 3, "but got 3"),
    ],
)
def test_damaged_strategies_are_named_and_their_error_is_the_cause(
    path: tuple[str | int, ...], value: Any, words: str
) -> None:
    with pytest.raises(RecordError, match="this plan is damaged: .*" + re.escape(words)) as caught:
        Plan.from_dict(damaged(path, value))
    assert isinstance(caught.value.__cause__, CheapgradError)
    assert not isinstance(caught.value.__cause__, RecordError)


@dataclass(frozen=True, repr=False)
class OwnDesign(Systematic):
    """A user's own."""


def test_known_types_are_public_or_the_user_s_own() -> None:
    with pytest.raises(RecordError, match=f"unknown type '{TrialDesign.__name__}'") as caught:
        Plan.from_dict(damaged(("layers", 1, "cotangent", "design", "type"), TrialDesign.__name__))
    known = re.findall(r"\w+", str(caught.value).split("known:")[1])
    assert OwnDesign.__name__ in known
    parts = (AbstractStrategy, AbstractScore, AbstractDesign)
    shipped = {
        name
        for name, value in vars(sketch).items()
        if isinstance(value, type) and issubclass(value, parts) and not name.startswith("Abstract")
    }
    assert shipped <= set(known)
    assert "TrialDesign" not in known
    design = OwnDesign()
    assert sketch.from_dict(design.to_dict()) == design
