"""Plans in units of an optimizer's steps: noise by parameter is weighed by hand, and drawn."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

import cheapgrad
from cheapgrad.errors import OptimizerStateError, RecordError
from cheapgrad.planning import Plan
from cheapgrad.planning.capture import capture_pass
from cheapgrad.planning.passes import Step
from cheapgrad.planning.tangents import push_forward
from cheapgrad.planning.units import optimizer_units
from tests.planning.networks import exact_gradients, loss_fn, make_batches, make_mlp, measure_noise
from tests.planning.test_plan import CASES, ROWS, make


def make_optimizer(model: nn.Module, spread: float = 0.0, eps: float = 0.0) -> torch.optim.Adam:
    """Return an optimizer whose second moments differ by powers of ten between parameters, and within each."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 0.5), eps=eps)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        power = spread * (2 * torch.rand((), generator=generator, dtype=torch.float64) - 1)
        within = 1 + 0.5 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * (spread > 0)
        # Its running mean has seen half of what the first gradient squared is.
        optimizer.state[parameter]["exp_avg_sq"].copy_(0.5 * 10 ** (2 * power) * within)
    return optimizer


def weigh(model: nn.Module, optimizer: torch.optim.Adam) -> Tensor:
    """Return what every entry of the flat gradient is to be multiplied by, but for one factor of all."""
    factors = [
        torch.full((parameter.numel(),), (2 * optimizer.state[parameter]["exp_avg_sq"].mean()) ** -0.5)
        for parameter in model.parameters()
    ]
    return torch.cat(factors).double()


def measure_weighed(model, batches, exact, factors, draws):
    """Return noise in these units, from gradients drawn; see `measure_noise`."""
    torch.manual_seed(8)
    variance = torch.stack([factors * gradient for gradient in exact]).var(0).sum()
    parameters = list(model.parameters())
    errors = []
    for _ in range(draws):
        for batch, gradient in zip(batches, exact, strict=True):
            drawn = torch.autograd.grad(loss_fn(model, batch), parameters)
            flat = torch.cat([value.flatten() for value in drawn])
            errors.append((factors * (flat - gradient)).square().sum() / variance)
    found = torch.stack(errors)
    return float(found.mean()), float(found.std() / len(found) ** 0.5)


@pytest.mark.parametrize("case", CASES)
def test_noise_is_what_is_drawn_in_these_units(case: str) -> None:
    network, budgets, strategies = CASES[case]
    model, batches = make(network)
    optimizer = make_optimizer(model, spread=1.0)
    before = copy.deepcopy(optimizer.state_dict())
    exact, factors = exact_gradients(model, batches), weigh(model, optimizer)
    settings = {"strategies": strategies, "skip_small": False, **budgets}
    plan = cheapgrad.plan(model, loss_fn, batches, optimizer=optimizer, **settings)
    plain = cheapgrad.plan(model, loss_fn, batches, **settings)
    assert str(optimizer.state_dict()) == str(before)
    assert plan.in_optimizer_units
    assert not plain.in_optimizer_units
    handle = cheapgrad.approximate(model, plan)
    draws = 40 if case == "mlp, rows" else 12
    noise, error = measure_weighed(model, batches, exact, factors, draws)
    unweighed, _ = measure_noise(model, batches, exact, draws)
    handle.revert()
    assert error < 0.06 * noise
    # Below columns there is no law, but what was measured for rows.
    assert plan.predicted.noise_fraction == pytest.approx(noise, rel=0.25 if case == "mlp, columns" else 0.15)
    assert noise <= 1.15 * budgets.get("noise", float("inf"))
    # These are other units, where layers differ in what is added to them.
    assert network == "mlp" or noise != pytest.approx(unweighed, rel=0.15)


def test_what_is_passed_down_is_in_these_units() -> None:
    model, batches = make_mlp(4), make_batches((24,))
    optimizer = make_optimizer(model, spread=3.0)
    step = Step(model, loss_fn, optimizer=optimizer)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    calls = capture_pass(step, layers, batches[0]).calls
    found: dict[str, list[Tensor]] = {}
    before = [parameter.detach().clone() for parameter in model.parameters()]
    generator = torch.Generator().manual_seed(1)
    seeds = {call.layer: torch.randn(call.input.shape, generator=generator, dtype=torch.float64) for call in calls}

    def take(call, tangent):
        found.setdefault(call.layer, []).append((tangent * seeds[call.layer]).sum())

    push_forward(step, batches[0], calls, take, probes=600)
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    inputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: inputs.__setitem__(name, args[0]))
        for name, module in layers.items()
    ]
    loss_fn(model, batches[0])
    for hook in hooks:
        hook.remove()
    scale = step.units.factors[0] / float(weigh(model, optimizer)[0])
    factors = scale * weigh(model, optimizer)
    assert set(found) == set(layers) - {"0"}
    for name, products in found.items():
        gradients = torch.autograd.grad(
            inputs[name], list(model.parameters()), seeds[name], retain_graph=True, allow_unused=True
        )
        flat = torch.cat(
            [
                (torch.zeros_like(parameter) if value is None else value).flatten()
                for parameter, value in zip(model.parameters(), gradients, strict=True)
            ]
        )
        expected = float((factors * flat).square().sum())
        # Squares of nearly normal numbers: six standard errors.
        assert float(torch.stack(products).square().mean()) == pytest.approx(expected, rel=6 * (2 / 600) ** 0.5)


def test_even_units_are_no_units() -> None:
    model, batches = make("mlp")
    settings = {"strategies": ROWS, "skip_small": False, "flops": "55 %"}
    plain = cheapgrad.plan(model, loss_fn, batches, **settings)
    even = cheapgrad.plan(model, loss_fn, batches, optimizer=make_optimizer(model), **settings)
    assert [layer.cotangent for layer in even.layers] == [layer.cotangent for layer in plain.layers]
    assert even.predicted.noise_fraction == pytest.approx(plain.predicted.noise_fraction, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-2, 1e2])
def test_a_plan_does_not_depend_on_the_units_of_a_parameter(scale: float) -> None:
    """The head in other units, so that its gradient is shorter or longer: steps of the optimizer are the same."""

    class Scaled(nn.Module):
        def __init__(self, layer: nn.Linear, scale: float) -> None:
            super().__init__()
            self.scale, self.bias = scale, layer.bias
            self.weight = nn.Parameter(layer.weight.detach() / scale)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight * self.scale, self.bias)

    plans, plains = [], []
    for factor in (1.0, scale):
        model, batches = make("mlp", 6)
        model[-1] = Scaled(model[-1], factor)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.0, eps=0.0)
        for batch in batches:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
        optimizer.zero_grad()
        settings = {"strategies": ROWS, "skip_small": False, "flops": "55 %"}
        plans.append(cheapgrad.plan(model, loss_fn, batches, optimizer=optimizer, **settings))
        plains.append(cheapgrad.plan(model, loss_fn, batches, **settings))
    first, second = plans
    assert first.layers
    assert [layer.cotangent for layer in first.layers] == [layer.cotangent for layer in second.layers]
    assert second.predicted.noise_fraction == pytest.approx(first.predicted.noise_fraction, rel=0.02)
    ratio = plains[1].predicted.noise_fraction / plains[0].predicted.noise_fraction
    assert not 0.85 < ratio < 1.15


def test_units_are_the_inverse_roots_of_mean_second_moments() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = make_optimizer(model, spread=1.0, eps=0.3)
    names = [name for name, _ in model.named_parameters()]
    parameters = list(model.parameters())
    factors = torch.tensor(optimizer_units(optimizer, names, parameters).factors, dtype=torch.float64)
    expected = torch.stack(
        [1 / ((2 * optimizer.state[one]["exp_avg_sq"].double().mean()).sqrt() + 0.3) for one in parameters]
    )
    torch.testing.assert_close(factors / factors[0], expected / expected[0], rtol=1e-6, atol=0.0)
    sizes = torch.tensor([one.numel() for one in parameters], dtype=torch.float64)
    assert float((factors.square() * sizes).sum() / sizes.sum()) == pytest.approx(1.0)


def test_what_the_optimizer_does_not_move_is_left_out_and_named() -> None:
    model, batches = make_mlp(4), make_batches((24,))
    optimizer = make_optimizer(model)
    optimizer.state[model[2].bias]["exp_avg_sq"].fill_(1e-34)
    del optimizer.state[model[4].weight]
    names = [name for name, _ in model.named_parameters()]
    units = optimizer_units(optimizer, names, list(model.parameters()))
    assert dict(zip(names, units.factors, strict=True))["2.bias"] == 0
    assert dict(zip(names, units.factors, strict=True))["4.weight"] == 0
    plan = cheapgrad.plan(model, loss_fn, batches, strategies=ROWS, skip_small=False, flops="55 %", optimizer=optimizer)
    assert any("has not stepped 1 of 8 parameters, the first one is 4.weight" in one for one in plan.remarks)
    assert any("zero but for rounding, the first one is 2.bias" in one for one in plan.remarks)
    exact = exact_gradients(model, batches)
    factors = torch.cat(
        [torch.full((value.numel(),), f) for value, f in zip(model.parameters(), units.factors, strict=True)]
    )
    cheapgrad.approximate(model, plan)
    noise, _ = measure_weighed(model, batches, exact, factors.double(), draws=40)
    assert plan.predicted.noise_fraction == pytest.approx(noise, rel=0.15)


def test_a_plan_says_its_units_and_keeps_them_in_a_file() -> None:
    model, batches = make("mlp")
    settings = {"strategies": ROWS, "skip_small": False, "flops": "55 %"}
    plan = cheapgrad.plan(model, loss_fn, batches, optimizer=make_optimizer(model, spread=1.0), **settings)
    assert "batches, in units of the optimizer's steps (modelled;" in str(plan)
    assert Plan.from_json(plan.to_json()) == plan
    plain = dataclasses.replace(plan, in_optimizer_units=False)
    assert "in units of" not in str(plain)
    data = plain.to_dict()
    # Plans that were written before there were such units do not say so.
    del data["in_optimizer_units"]
    assert Plan.from_dict(data) == plain
    with pytest.raises(RecordError, match=r"in_optimizer_units.*'yes'"):
        Plan.from_dict({**data, "in_optimizer_units": "yes"})


def test_other_optimizers_are_refused_and_the_model_is_left_alone() -> None:
    model, batches = make("mlp")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(OptimizerStateError, match="the SGD has no state for any of the 16 trainable parameters"):
        cheapgrad.plan(model, loss_fn, batches, flops="55 %", optimizer=torch.optim.SGD(model.parameters()))
    with pytest.raises(OptimizerStateError, match=r"optimizer must be a torch\.optim\.Optimizer, but is a str 'adam'"):
        cheapgrad.plan(model, loss_fn, batches, flops="55 %", optimizer="adam")  # type: ignore[arg-type] - refused
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(type(module) is nn.Linear for module in model.modules() if isinstance(module, nn.Linear))
