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
from cheapgrad.planning.controller_claim import Claim
from cheapgrad.planning.controller_trial import Trial, TrialDesign
from cheapgrad.planning.controller_units import StepUnits
from cheapgrad.planning.units import optimizer_units
from cheapgrad.sketch import RowSample, Systematic
from tests.planning.controlled import (
    B,
    D,
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


@pytest.mark.parametrize("target", [TARGET, 0.6])
def test_noise_is_kept_in_units_of_the_steps(target: float) -> None:
    model, handle, controller, optimizer = set_up_with_optimizer(noise=target)
    factors, generator = weigh(model, optimizer), torch.Generator().manual_seed(1)
    weighed, plain = [], []
    for step in range(1, 322):
        run_step(model, controller, generator)
        if step % 40 == 1 and step > 40:
            keeps = controller.keeps
            for found, scale, batches in ((weighed, factors, 40), (plain, torch.ones_like(factors), 10)):
                measure = functools.partial(measure_noise, model, handle, share=scale.mul, batches=batches, draws=2)
                found.append(measure_between_trials(handle, keeps, measure))
    assert sum(weighed) / len(weighed) == pytest.approx(target, rel=0.2)
    # One who leaves the units out keeps another noise at the target.
    assert sum(plain) < 0.3 * sum(weighed)


class Attending(nn.Module):
    """Attention and a chain, each of whose weights has another unit."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.below, self.above = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.head = nn.Linear(D, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x + self.above(torch.tanh(self.below(x))))


@pytest.mark.parametrize("is_cast", [False, True], ids=["double", "autocast"])
def test_each_weight_has_its_own_factor_whoever_draws(is_cast: bool) -> None:
    torch.manual_seed(0)
    model = Attending() if is_cast else Attending().double()
    handle = cheapgrad.approximate(model, cheapgrad.Rule(cotangent=RowSample(0.5)), skip_small=False)
    optimizer = make_optimizer(model, spread=1.5)
    units = StepUnits(optimizer, Claim(handle).layers())
    factors = units.read()
    # Also that of a rebuilt or packed weight is one of them, and no two are alike.
    assert len(set(factors.values())) == len(factors) == 5
    find, found = units.resolve(factors), []
    trial = Trial(0, lambda: B, find_factor=lambda layer, weight: found.append(find(layer, weight)) or found[-1])
    strategies = {
        name: RowSample(0.5, design=TrialDesign(Systematic(), trial, name, 0.5)) for name in handle.strategies()
    }
    handle.replace_strategies(strategies)
    x = torch.randn(B, 6, D, dtype=torch.float32 if is_cast else torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_cast):
        loss = model(x).float().square().mean()
    loss.backward()
    by_name = {name: factors[name] for name in ("head.weight", "above.weight", "below.weight")}
    assert found[:3] == list(by_name.values())
    # The lowest layer's input needs no gradient, so that its weight is not at hand.
    assert found[3] == factors["attention.out_proj.weight"]
    joined = find("attention", None)
    assert set(found[4:]) <= {factors["attention.in_proj_weight"], joined}


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
    assert controller.obstacle == "the optimizer has made no step yet, so that its steps have no unit"
    train(model, controller, optimizer, 3, generator)
    assert [record.step for record in controller.history] == [2, 3]
    # The unit is that of the step before.
    weights = {name: value for name, value in named_weights(model).items() if value.dim() == 2}
    expected = optimizer_units(optimizer, list(weights), list(weights.values())).factors
    assert controller.state_dict()["factors"] == dict(zip(weights, expected, strict=True))


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return weights by the layer's name."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {f"{name}.weight": module.weight for name, module in layers.items()}


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
    for factors, words in (
        ({"head.weight": -1.0}, "a number from 0 to 1e"),
        ({"head.weight": 1.0}, r"of the weights \[\] only"),
    ):
        with pytest.raises(ControlError, match=f"factors must be {words}"):
            plain.load_state_dict({**plain.state_dict(), "factors": factors})


def test_optimizers_without_a_unit_are_refused_and_the_controller_before_stays() -> None:
    model, handle, before = set_up(keep=0.25)
    generator = torch.Generator().manual_seed(6)
    momentum, plain = (torch.optim.SGD(model.parameters(), lr=1e-3, momentum=value) for value in (0.9, 0.0))
    for wrong, words in (
        (model, "must be a torch.optim.Optimizer"),
        (momentum, "the SGD keeps no running mean of squared gradients"),
        (plain, "the SGD keeps no running mean of squared gradients"),
        (
            torch.optim.Adam([nn.Parameter(torch.ones(3))]),
            r"does not hold 5 weights of controlled layers, the first one is",
        ),
    ):
        with pytest.raises(OptimizerStateError, match=words):
            Controller(handle, optimizer=wrong)  # type: ignore[arg-type]
    run_step(model, before, generator)
    model.requires_grad_(False)
    with pytest.raises(OptimizerStateError, match="none of the controlled layers has a weight that is trained"):
        Controller(handle, optimizer=torch.optim.AdamW(model.parameters()))


def test_an_optimizer_that_never_steps_is_an_error() -> None:
    model, handle, _ = set_up(keep=0.25)
    controller, generator = Controller(handle, optimizer=torch.optim.AdamW(model.parameters())), torch.Generator()
    for _ in range(31):
        run_step(model, controller, generator)
    with pytest.raises(
        OptimizerStateError, match="the AdamW has stepped no weight of the controlled layers in 32 steps"
    ):
        run_step(model, controller, generator)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_loss_scaler_skips_are_none(fused: bool) -> None:
    torch.manual_seed(3)
    model = Tokens()
    handle = cheapgrad.approximate(model, cheapgrad.Rule(cotangent=RowSample(0.25)), skip_small=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000, backoff_factor=2.0**-120)
    controller, generator = Controller(handle, noise=TARGET, optimizer=optimizer), torch.Generator().manual_seed(8)
    for step in range(6):
        optimizer.zero_grad()
        x, direction = make_batch(generator)
        # Scaled by so much, the first gradient overflows.
        scaler.scale(1e9 * (direction.float() * model(x.float())).mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        controller.step()
        if step == 0:
            assert (controller.noise, controller.history) == (None, [])
    assert controller.noise is not None


def test_a_weight_that_is_thawed_has_a_factor_from_then_on() -> None:
    model, handle, _ = set_up(keep=0.25)
    assert isinstance(model.head, nn.Linear)
    lowest = named_weights(model)["blocks.0.1.weight"]
    lowest.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    controller, generator = Controller(handle, noise=TARGET, optimizer=optimizer), torch.Generator().manual_seed(9)
    train(model, controller, optimizer, 2, generator)
    assert "blocks.0.1.weight" not in controller.state_dict()["factors"]
    lowest.requires_grad_(True)
    # Not stepped yet when it is read: that its noise does not count is said.
    controller.step()
    assert "has not stepped 1 of 5 parameters, the first one is blocks.0.1.weight" in str(controller._units.remarks)
    train(model, controller, optimizer, 2, generator)
    assert controller.state_dict()["factors"]["blocks.0.1.weight"] > 0
