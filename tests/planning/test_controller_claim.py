"""Who steers a conversion: one controller, whatever handle it was made for, and what becomes of the one before."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import cheapgrad
from cheapgrad.errors import ControlError, ControlWarning, ConversionError
from cheapgrad.planning.controller import Controller
from cheapgrad.planning.controller_trial import TrialDesign
from cheapgrad.sketch import RowSample, Systematic
from tests.copies import COPIES

D = 16
KEEP = RowSample(0.5)


def _setup(*layers: nn.Module) -> tuple[nn.Sequential, cheapgrad.Handle]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 4), *layers)
    return model, cheapgrad.approximate(model, cheapgrad.Rule(nn.Linear, cotangent=KEEP), skip_small=False)


def _backward(model: nn.Module, seed: int = 1) -> None:
    x = torch.randn(24, D, generator=torch.Generator().manual_seed(seed))
    (model(x) - 1).square().mean().backward()


def _step(model: nn.Module, controller: Controller, steps: int = 1) -> None:
    for seed in range(steps):
        _backward(model, seed)
        controller.step()


def _strategies(model: nn.Module) -> dict[str, object]:
    return dict(cheapgrad.get_handle(model).strategies())


def _is_in_trial(strategy: object) -> bool:
    return isinstance(strategy, RowSample) and isinstance(strategy.design, TrialDesign)


def test_controller_of_another_handle_of_the_model_takes_over() -> None:
    model, handle = _setup()
    first = Controller(handle, noise=0.2)
    _step(model, first, 5)
    assert first.keeps != {"0": 0.5, "2": 0.5}, "else there is nothing to put back"
    other = cheapgrad.get_handle(model)
    second = Controller(other, noise=0.2)
    assert second.keeps == {"0": 0.5, "2": 0.5}
    assert all(value.design.base == Systematic() for value in handle.strategies().values())  # type: ignore[attr-defined]
    with pytest.raises(ControlError, match="or for another one of the same model, and took over"):
        first.step()
    _step(model, second)
    assert [record.step for record in second.history] == [0], "the trial of the pass is the second's"
    # And back again, by the handle of the conversion.
    third = Controller(handle, noise=0.2)
    assert third.keeps == {"0": 0.5, "2": 0.5}
    with pytest.raises(ControlError, match="took over"):
        second.step()


def test_all_handles_of_a_model_show_the_strategies_in_force() -> None:
    model, handle = _setup()
    cheapgrad.get_handle(model).replace_strategies({"2": RowSample(0.125)})
    assert {row.name: row.cotangent for row in handle.rows}["2"] == "RowSample(keep=0.125)"
    handle.revert()
    assert {row.name: row.cotangent for row in handle.rows}["2"] == "RowSample(keep=0.125)"


def test_layers_that_only_the_first_controller_steered_are_as_converted() -> None:
    model, handle = _setup()
    first = Controller(handle, noise=0.2)
    _step(model, first, 5)
    assert _is_in_trial(_strategies(model)["2"])
    second = Controller(cheapgrad.get_handle(model[0]), noise=0.2)
    assert second.keeps == {"": 0.5}
    assert _strategies(model)["2"] == KEEP
    assert not _is_in_trial(_strategies(model)["2"])
    assert _is_in_trial(_strategies(model)["0"])
    with pytest.raises(ControlError, match="took over"):
        first.step()


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_made_during_a_trial_is_steered_from_what_was_converted(
    duplicate: Callable[[nn.Module], nn.Module],
) -> None:
    model, handle = _setup()
    controller = Controller(handle, noise=0.2)
    _step(model, controller, 5)
    in_force = handle.strategies()
    assert all(map(_is_in_trial, in_force.values()))
    twin = duplicate(model)
    # Budgets as they are, and no trial: what the copy draws is nothing to the model's controller.
    assert {name: value.keep for name, value in _strategies(twin).items()} == {  # type: ignore[attr-defined]
        name: value.keep
        for name, value in in_force.items()  # type: ignore[attr-defined]
    }
    assert not any(map(_is_in_trial, _strategies(twin).values()))
    _backward(twin)
    assert controller._trial is not None
    assert controller._trial.totals[0] == 0
    own = Controller(cheapgrad.get_handle(twin), noise=0.2)
    assert own.keeps == {"0": 0.5, "2": 0.5}
    _step(twin, own)
    assert own.history
    # The model's own goes on, and both states are of the same conversion.
    _step(model, controller)
    own.load_state_dict(controller.state_dict())
    assert own.keeps == controller.keeps


def test_a_copy_of_a_part_is_steered_from_what_was_converted() -> None:
    model, handle = _setup()
    _step(model, Controller(handle, noise=0.2), 5)
    part = copy.deepcopy(nn.Sequential(model[2]))
    assert Controller(cheapgrad.get_handle(part)).keeps == {"0": 0.5}


def test_a_relieved_controller_loads_no_state() -> None:
    model, handle = _setup()
    first = Controller(handle, noise=0.2)
    _step(model, first, 5)
    state, keeps = first.state_dict(), first.keeps
    second = Controller(handle, noise=0.2)
    in_force = handle.strategies()
    with pytest.raises(ControlError, match="took over"):
        first.load_state_dict(state)
    assert first.keeps == keeps
    assert all(handle.strategies()[name] is value for name, value in in_force.items())
    _step(model, second)
    assert second.history


def test_a_controller_of_a_reverted_handle_loads_no_state() -> None:
    model, handle = _setup()
    controller = Controller(handle)
    _step(model, controller)
    state = controller.state_dict()
    controller = Controller(handle)
    handle.revert()
    with pytest.raises(ConversionError, match="this handle was reverted already"):
        controller.load_state_dict(state)
    assert controller.history == []


def test_warning_raised_as_an_error_relieves_nobody() -> None:
    model, handle = _setup(nn.BatchNorm1d(4))
    with pytest.warns(ControlWarning):
        first = Controller(handle, noise=0.2)
    _step(model, first, 5)
    in_force = handle.strategies()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ControlWarning):
            Controller(handle, noise=0.2)
    assert all(handle.strategies()[name] is value for name, value in in_force.items())
    history = len(first.history)
    _step(model, first)
    assert len(first.history) == history + 1


def test_failure_while_the_strategies_are_set_relieves_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    model, handle = _setup()
    first = Controller(handle, noise=0.2)
    _step(model, first, 5)
    in_force = handle.strategies()

    def fail(seed: int, *_: object) -> None:
        raise ControlError(f"no trial of seed {seed}")

    with monkeypatch.context() as patch:
        patch.setattr("cheapgrad.planning.controller.Trial", fail)
        with pytest.raises(ControlError, match="no trial of seed 2654435761"):
            Controller(handle)
    assert all(handle.strategies()[name] is value for name, value in in_force.items())
    _step(model, first)


def test_seeds_larger_than_torch_takes_are_taken() -> None:
    model, handle = _setup()
    controller = Controller(handle, seed=2**80 + 3)
    _step(model, controller, 2)
    assert len(controller.history) == 2


def test_layers_that_are_gone_are_named() -> None:
    model, handle = _setup()
    controller = Controller(handle)
    _step(model, controller)
    state = controller.state_dict()
    model[2] = nn.Linear(D, 4)
    _backward(model)
    for use in (controller.step, lambda: controller.load_state_dict(state)):
        with pytest.raises(ControlError, match=r"layer '2' under control is gone: .*make a new controller"):
            use()
    rest = Controller(handle)
    assert rest.keeps == {"0": 0.5}
    _step(model, rest)
    assert [record.step for record in rest.history] == [0]
    model[0] = nn.Linear(D, D)
    with pytest.raises(ControlError, match="layer '0' under control is gone"):
        rest.step()


def test_layer_replaced_between_forward_and_backward_is_named() -> None:
    model, handle = _setup()
    controller = Controller(handle)
    loss: Tensor = model(torch.randn(8, D)).square().mean()
    model[0], model[2] = nn.Linear(D, D), nn.Linear(D, 4)
    loss.backward()
    with pytest.raises(ControlError, match="layers '0' and '2' under control are gone"):
        controller.step()


def test_reverted_handle_is_said_to_be_reverted() -> None:
    _, handle = _setup()
    handle.revert()
    with pytest.raises(ConversionError, match="this handle was reverted already"):
        Controller(handle)


def test_names_are_those_of_all_layers_that_see_the_batch() -> None:
    _, handle = _setup(nn.BatchNorm1d(4))
    with pytest.warns(ControlWarning, match="^layer '3' normalises over the batch.* let it normalise by running"):
        Controller(handle)
    _, handle = _setup(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    with pytest.warns(ControlWarning, match="^layers '3' and '4' normalise over the batch.* let them normalise by"):
        Controller(handle)
    _, handle = _setup(*(nn.BatchNorm1d(4) for _ in range(5)))
    with pytest.warns(ControlWarning, match="^layers '3', '4', '5' and 2 more normalise over the batch"):
        Controller(handle)


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_with_tokens_first_is_named(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 32, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    handle = cheapgrad.approximate(model, cheapgrad.Rule("*linear*", cotangent=RowSample(0.5)), skip_small=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Controller(handle)
    texts = [str(each.message) for each in caught if each.category is ControlWarning]
    assert [text.startswith("layer 'layers.0.self_attn' has the batch on the second axis") for text in texts] == [
        True
    ] * (not batch_first)


def test_batch_norm_without_running_statistics_sees_the_batch_in_eval_too() -> None:
    model, handle = _setup(nn.BatchNorm1d(4, track_running_stats=False), nn.BatchNorm1d(4))
    model[3].eval()
    model[4].eval()
    x = torch.randn(8, 4)
    assert not torch.equal(model[3](x)[:4], model[3](x[:4])), "an example's output depends on the others"
    with pytest.warns(ControlWarning, match="^layer '3' normalises over the batch"):
        Controller(handle)
