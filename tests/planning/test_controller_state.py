"""What a controller keeps, what it refuses to go on from, and what it leaves out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from cheapgrad.errors import ControlError
from cheapgrad.planning.controller import Controller
from cheapgrad.planning.controller_curve import KEEPS
from cheapgrad.planning.controller_law import NoiseSchedule, find_shift
from tests.planning.controlled import make_batch, mean_loss, run_step, set_up


def test_states_of_other_arguments_are_refused_with_both_values() -> None:
    _, _, saved = set_up(noise=0.05, every=32)
    _, _, other = set_up(noise=0.3, every=8, seed=5, least_keep=0.4)
    text = "noise=0.05, every=32, least_keep=0.05, seed=0, but this one has noise=0.3, every=8, least_keep=0.4, seed=5"
    with pytest.raises(ControlError, match=text):
        other.load_state_dict(saved.state_dict())
    assert other.target == 0.3


def test_states_of_other_schedules_are_refused() -> None:
    _, _, saved = set_up(noise=NoiseSchedule(0.3, 0.02, 100))
    _, _, same = set_up(noise=NoiseSchedule(0.3, 0.02, 100))
    same.load_state_dict(saved.state_dict())
    for noise in (NoiseSchedule(0.3, 0.02, 50), 0.3):
        _, _, other = set_up(noise=noise)
        with pytest.raises(ControlError, match=r"'steps': 100}, but this one has noise="):
            other.load_state_dict(saved.state_dict())


def test_there_is_a_record_after_each_trial_and_after_no_other_look() -> None:
    model, _, controller = set_up(noise=0.1, every=2)
    generator = torch.Generator().manual_seed(9)
    for _ in range(60):
        run_step(model, controller, generator)
    # At each of the first eight steps, then at every second one; layers are looked at in between.
    assert [record.step for record in controller.history] == [*range(8), *range(8, 60, 2)]
    assert len(controller.state_dict()["history"]) == 34


def _step_on_nan(model: nn.Module, controller: Controller, generator: torch.Generator) -> None:
    x, direction = make_batch(generator)
    direction[3, 2] = math.nan
    mean_loss(model, (x, direction)).backward()
    controller.step()


@pytest.mark.parametrize(("step", "look"), [(4, "HALVES"), (9, "LAYERS"), (193, "CURVES")])
def test_a_gradient_that_is_not_finite_is_left_out_and_said(step: int, look: str) -> None:
    model, _, controller = set_up(noise=0.1)
    generator = torch.Generator().manual_seed(10)
    for _ in range(min(step, 12)):
        run_step(model, controller, generator)
    controller.load_state_dict({**controller.state_dict(), "step": step})
    assert controller._trial is not None
    assert controller._trial.look.name == look
    assert controller.obstacle == ""
    keeps, noise, curves = controller.keeps, controller.noise, controller.state_dict()["curves"]
    _step_on_nan(model, controller, generator)
    assert controller.obstacle == "the gradient is not finite"
    assert (controller.keeps, controller.noise) == (keeps, noise)
    assert all(torch.equal(curve, curves[layer]) for layer, curve in controller.state_dict()["curves"].items())
    run_step(model, controller, generator)
    assert controller.obstacle == ""


def test_gradients_that_stay_not_finite_are_an_error() -> None:
    model, _, controller = set_up()
    generator = torch.Generator().manual_seed(11)
    _step_on_nan(model, controller, generator)
    _step_on_nan(model, controller, generator)
    with pytest.raises(ControlError, match="3 trials in a row measured nothing: the gradient is not finite"):
        _step_on_nan(model, controller, generator)


def test_no_budget_is_read_off_a_curve_that_is_not_finite() -> None:
    curve = torch.tensor([1 / keep - 1 for keep in KEEPS] + [1.0], dtype=torch.float64)
    assert math.isfinite(find_shift({"a": curve}, {"a": 0.5}, {"a": 1.0}, 0.1, 0.01))
    for changed, weight, target in ((math.nan, 1.0, 0.1), (0.3, math.inf, 0.1), (0.3, 1.0, math.nan)):
        other = curve.clone()
        other[4] = changed
        with pytest.raises(ControlError, match="the noise of layer 'a' is not finite"):
            find_shift({"a": other}, {"a": 0.5}, {"a": weight}, target, 0.01)


def _damaged(state: dict[str, Any]) -> dict[str, tuple[dict[str, Any], str]]:
    """Return states that are each damaged in one place, and what names it."""
    curve, pair, record = state["curves"]["head"], state["layers"]["head"], state["history"][0]
    return {
        **{f"{name} None": ({**state, name: None}, f"{name} must be") for name in state if name not in _NONE_ALLOWED},
        "step -1": ({**state, "step": -1}, "step must be a whole number of at least 0, but is -1"),
        "step 2.5": ({**state, "step": 2.5}, "step must be a whole number of at least 0, but is 2.5"),
        "shift": ({**state, "shift": 1e9}, "shift must be a number from -12 to 12, but is 1000000000.0"),
        "misses": ({**state, "misses": True}, "misses must be a whole number of at least 0, but is True"),
        "noise": ({**state, "noise": math.nan}, "noise must be a finite number or None, but is nan"),
        "log_size": ({**state, "log_size": "0"}, "log_size must be a finite number or None, but is '0'"),
        "totals short": ({**state, "totals": state["totals"][:3]}, "totals must be 8 finite float64 numbers"),
        "totals list": ({**state, "totals": [0.0] * 8}, "totals must be 8 finite float64 numbers"),
        "totals nan": ({**state, "totals": state["totals"] * math.nan}, "totals must be 8 finite"),
        "totals zero": ({**state, "totals": state["totals"] * 0}, "with predicted_gain above 0"),
        "rows": ({**state, "rows": {"head": 0}}, "rows must be a number of rows by layer"),
        "rows of others": ({**state, "rows": {"tail": 8}}, "rows must be of the layers"),
        "curves": ({**state, "curves": {"head": curve[:, 1:]}}, r"curves must be a finite float64 tensor of shape"),
        "curves zero": ({**state, "curves": {"head": curve * 0}}, "with weights above 0"),
        "curves of others": ({**state, "curves": {"tail": curve}}, "curves must be of the layers"),
        "layers": ({**state, "layers": {"head": pair[0]}}, r"layers must be a finite float64 tensor of shape \[3\]"),
        "layers missing": ({**state, "layers": {}}, "layers must be of all layers that have a curve"),
        "followers": ({**state, "followers": "head"}, "followers must be a list of layers"),
        "keeps": ({**state, "keeps": {"head": "0.5"}}, "keeps must be a number for each layer"),
        "settings": ({**state, "settings": {"noise": torch.ones(2)}}, "settings must be a number"),
        "history": ({**state, "history": [{"step": 0}]}, "history must be a list of records"),
        "record": ({**state, "history": [{**record, "noise": None}]}, "history must be a list of records"),
    }


_NONE_ALLOWED = ("noise", "log_size")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return value.tolist() if isinstance(value, torch.Tensor) else value


def test_damaged_states_are_named_and_nothing_of_them_is_loaded() -> None:
    model, handle, controller = set_up(noise=0.1)
    generator = torch.Generator().manual_seed(12)
    for _ in range(10):
        run_step(model, controller, generator)
    saved = controller.state_dict()
    for _ in range(4):
        run_step(model, controller, generator)
    before, trial, in_force = _plain(controller.state_dict()), controller._trial, handle.strategies()
    for case, (state, text) in _damaged(saved).items():
        with pytest.raises(ControlError, match=text):
            controller.load_state_dict(state)
        assert _plain(controller.state_dict()) == before, case
        assert controller._trial is trial, case
        assert all(handle.strategies()[name] is value for name, value in in_force.items()), case
    run_step(model, controller, generator)
    controller.load_state_dict(saved)
    assert controller.state_dict()["step"] == 10


@pytest.mark.parametrize("state", [None, 3, [], "state"])
def test_what_is_no_state_is_named(state: Any) -> None:
    _, _, controller = set_up()
    with pytest.raises(ControlError, match=f"this is no state of a controller, but a {type(state).__name__}"):
        controller.load_state_dict(state)
