"""The controller in units of an optimizer's steps: noise weighed by hand and drawn, state, errors."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

import cheapgrad
from cheapgrad.errors import ControlError, OptimizerStateError
from cheapgrad.planning.controller import Controller
from cheapgrad.planning.units import optimizer_units
from cheapgrad.sketch import RowSample
from tests.planning.controlled import (
    Tokens,
    list_weights,
    make_batch,
    mean_loss,
    measure_between_trials,
    measure_noise,
    run_step,
    set_up,
)
from tests.planning.test_plan_units import make_optimizer

TARGET = 0.1


def set_up_with_optimizer(
    spread: float = 1.5, **options: object
) -> tuple[nn.Module, cheapgrad.Handle, Controller, torch.optim.Adam]:
    """Return a controlled model, and an optimizer whose second moments differ by powers of ten between weights.

    Rows are drawn anew on the way down, so that weights differ in what is added to them.
    """
    torch.manual_seed(3)
    model = Tokens().double()
    keeps = {"head": 0.6, "blocks.1*": 0.5, "blocks.0*": 0.3}
    rules = [cheapgrad.Rule(pattern, cotangent=RowSample(keep)) for pattern, keep in keeps.items()]
    handle = cheapgrad.approximate(model, rules, skip_small=False)
    optimizer = make_optimizer(model, spread)
    return model, handle, Controller(handle, every=2, optimizer=optimizer, **options), optimizer  # type: ignore[arg-type]


def weigh(model: nn.Module, optimizer: torch.optim.Adam) -> Tensor:
    """Return what every entry of the flat gradient of the weights is to be multiplied by, but for one factor of all."""
    # The running mean has seen half of what it would be.
    roots = {weight: (2 * optimizer.state[weight]["exp_avg_sq"].mean()).sqrt() for weight in list_weights(model)}
    return torch.cat([torch.full((weight.numel(),), float(1 / root)) for weight, root in roots.items()]).double()


@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_noise_is_kept_in_units_of_the_steps(spread: float) -> None:
    model, handle, controller, optimizer = set_up_with_optimizer(spread, noise=TARGET)
    factors, generator = weigh(model, optimizer), torch.Generator().manual_seed(1)
    weighed, plain = [], []
    for step in range(1, 322):
        run_step(model, controller, generator)
        if step % 40 == 1 and step > 40:
            keeps = controller.keeps
            for found, scale in ((weighed, factors), (plain, torch.ones_like(factors))):
                measure = functools.partial(measure_noise, model, handle, share=scale.mul, batches=40, draws=2)
                found.append(measure_between_trials(handle, keeps, measure))
    assert sum(weighed) / len(weighed) == pytest.approx(TARGET, rel=0.2)
    # One who leaves the units out keeps another noise at the target.
    ratio = sum(plain) / sum(weighed)
    assert ratio == pytest.approx(1, rel=0.05) if spread == 0 else ratio < 0.3


def test_a_common_factor_of_all_second_moments_changes_nothing() -> None:
    keeps = []
    for scale in (1.0, 1e-8):
        model, _, controller, optimizer = set_up_with_optimizer(noise=TARGET)
        for state in optimizer.state.values():
            state["exp_avg_sq"] *= scale
        generator = torch.Generator().manual_seed(2)
        torch.manual_seed(3)
        for _ in range(12):
            run_step(model, controller, generator)
        keeps.append(controller.keeps)
    assert keeps[0] == pytest.approx(keeps[1], rel=1e-9)


def train(
    model: nn.Module, controller: Controller, optimizer: torch.optim.Optimizer, steps: int, generator: torch.Generator
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        mean_loss(model, make_batch(generator)).backward()
        optimizer.step()
        controller.step()


def test_nothing_is_measured_before_the_first_step_of_the_optimizer() -> None:
    model, handle, _ = set_up(keep=0.25)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    controller = Controller(handle, noise=TARGET, optimizer=optimizer)
    generator = torch.Generator().manual_seed(4)
    # As with a loss scaler, whose first steps are none of the optimizer's.
    run_step(model, controller, generator)
    assert (controller.noise, controller.keep, controller.history) == (None, 0.25, [])
    train(model, controller, optimizer, 3, generator)
    assert [record.step for record in controller.history] == [2, 3]
    # The unit is that of the step before.
    weights = {layer: module.weight for layer, module in model.named_modules() if isinstance(module, nn.Linear)}
    expected = optimizer_units(optimizer, list(weights), list(weights.values())).factors
    found = controller.state_dict()["factors"]
    assert [found[layer] for layer in weights] == list(expected)
    # The others have no weight of their own.
    assert {factor for layer, factor in found.items() if layer not in weights} == {1.0}


@pytest.mark.parametrize("loads_optimizer_first", [True, False])
def test_resuming_goes_on_bit_for_bit(loads_optimizer_first: bool) -> None:
    def make() -> tuple[nn.Module, Controller, torch.optim.Optimizer]:
        model, handle, _ = set_up()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, Controller(handle, noise=TARGET, every=3, optimizer=optimizer), optimizer

    model, controller, optimizer = make()
    generator = torch.Generator().manual_seed(5)
    train(model, controller, optimizer, 37, generator)
    saved = copy.deepcopy([each.state_dict() for each in (model, controller, optimizer)])
    states = torch.random.get_rng_state(), generator.get_state()
    train(model, controller, optimizer, 20, generator)
    resumed = make()
    order = (0, 2, 1) if loads_optimizer_first else (0, 1, 2)
    for place in order:
        resumed[place].load_state_dict(saved[place])
    torch.random.set_rng_state(states[0])
    generator.set_state(states[1])
    train(*resumed, 20, generator)
    for one, other in zip(model.parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(one, other)
    assert resumed[1].history == controller.history


def test_a_state_of_other_units_is_refused() -> None:
    _, _, controller, _ = set_up_with_optimizer()
    _, handle, _, _ = set_up_with_optimizer()
    plain = Controller(handle, every=2)
    for one, other in ((controller, plain), (plain, controller)):
        with pytest.raises(ControlError, match=f"has_optimizer={other is controller}, but this one has has_optimizer="):
            one.load_state_dict(other.state_dict())
    damaged = {**plain.state_dict(), "factors": {next(iter(handle.strategies())): -1.0}}
    with pytest.raises(ControlError, match="factors must be a number of at least 0 by layer"):
        plain.load_state_dict(damaged)


def test_optimizers_without_a_unit_are_refused_and_the_controller_before_stays() -> None:
    model, handle, before = set_up(keep=0.25)
    generator = torch.Generator().manual_seed(6)
    for wrong, words in (
        (model, "must be a torch.optim.Optimizer"),
        (
            torch.optim.Adam([nn.Parameter(torch.ones(3))]),
            r"does not hold 5 weights of controlled layers, the first one is",
        ),
    ):
        with pytest.raises(OptimizerStateError, match=words):
            Controller(handle, optimizer=wrong)  # type: ignore[arg-type]
    run_step(model, before, generator)
    momentum = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    with pytest.raises(OptimizerStateError, match="SGD"):
        train(model, Controller(handle, optimizer=momentum), momentum, 1, generator)
    plain = torch.optim.SGD(model.parameters(), lr=1e-3)
    controller = Controller(handle, optimizer=plain)
    train(model, controller, plain, 31, generator)
    with pytest.raises(
        OptimizerStateError, match="has no state for any weight of the controlled layers after 32 steps"
    ):
        train(model, controller, plain, 1, generator)
