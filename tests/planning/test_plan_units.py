"""Plans in units of an optimizer's steps: noise by parameter is weighed by hand, and drawn."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import cheapgrad
from cheapgrad.errors import BatchOrderError, NoMatchError, OptimizerStateError, RecordError, UnreachableBudgetError
from cheapgrad.planning import Plan
from cheapgrad.planning.capture import capture_pass
from cheapgrad.planning.passed_down import PassedDown
from cheapgrad.planning.passes import Step
from cheapgrad.planning.tangents import push_forward
from cheapgrad.planning.units import Units, optimizer_units
from cheapgrad.sketch import ColumnSample, StochasticRounding
from tests.planning.networks import exact_gradients, loss_fn, make_batches, make_mlp, measure_noise
from tests.planning.test_plan import CASES, ROWS, make
from tests.rescaled import Rescaled


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


def make_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """Return a step whose gradients are in units of the optimizer's."""
    step = Step(model, loss_fn)
    step.units = optimizer_units(optimizer, [name for name, _ in step.named_parameters], step.parameters)
    return step


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


def assert_same_state(optimizer: torch.optim.Optimizer, before: dict) -> None:
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert set(after["state"]) == set(before["state"])
    for key, state in after["state"].items():
        assert set(state) == set(before["state"][key])
        assert all(torch.equal(value, before["state"][key][name]) for name, value in state.items())


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
    assert_same_state(optimizer, before)
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
    step = make_step(model, optimizer)
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
    plans, plains = [], []
    for factor in (1.0, scale):
        model, batches = make("mlp", 6)
        model[-1] = Rescaled(model[-1], factor)
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
    del optimizer.state[model[4].bias]
    names = [name for name, _ in model.named_parameters()]
    units = optimizer_units(optimizer, names, list(model.parameters()))
    assert dict(zip(names, units.factors, strict=True))["2.bias"] == 0
    assert dict(zip(names, units.factors, strict=True))["4.bias"] == 0
    plan = cheapgrad.plan(model, loss_fn, batches, strategies=ROWS, skip_small=False, flops="55 %", optimizer=optimizer)
    assert any("has not stepped 1 of 8 parameters, the first one is 4.bias" in one for one in plan.remarks)
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
    assert "of the mini-batch variance in units of the optimizer's steps (modelled from 4 batches;" in str(plan)
    assert str(plan).startswith("cheapgrad plan for flops='55 %', noise in units of the optimizer's steps: ")
    assert Plan.from_json(plan.to_json()) == plan
    plain = dataclasses.replace(plan, in_optimizer_units=False)
    assert "in units of" not in str(plain)
    data = plain.to_dict()
    # Plans that were written before there were such units do not say so.
    del data["in_optimizer_units"]
    assert Plan.from_dict(data) == plain
    with pytest.raises(RecordError, match=r"in_optimizer_units.*'yes'"):
        Plan.from_dict({**data, "in_optimizer_units": "yes"})


def test_a_refused_ceiling_is_named_in_its_units() -> None:
    model, batches = make("mlp")
    settings = {"strategies": ROWS, "skip_small": False, "flops": "55 %", "noise": 1e-4}
    with pytest.raises(UnreachableBudgetError, match="contradict each other") as plain:
        cheapgrad.plan(model, loss_fn, batches, **settings)
    with pytest.raises(
        UnreachableBudgetError, match=r"needs noise=[0-9.e-]+ in units of the optimizer's steps, measured"
    ):
        cheapgrad.plan(model, loss_fn, batches, optimizer=make_optimizer(model, spread=1.0), **settings)
    assert "in units of" not in str(plain.value)


class Attention(nn.Module):
    """One head whose keys have a bias of their own, which moves no score relative to the others of its row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        held = self.norm(x)
        scores = self.query(held) @ self.key(held).mT / x.shape[-1] ** 0.5
        return x + scores.softmax(-1) @ self.value(held)


class Transformer(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Linear(12, width)
        self.attention, self.norm = Attention(width), nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(self.embedding(x))
        return self.head((x + self.feed(self.norm(x))).mean(1))


def make_transformer(context):
    """Return a transformer in single precision after some steps of AdamW, its loss in a context, and batches."""

    def loss(model, batch):
        with context():
            return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])

    torch.manual_seed(2)
    model = Transformer().train()
    batches = [(x.float(), y) for x, y in make_batches((6, 12), 8, examples=48)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        for batch in batches:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model, loss, batches, optimizer


@pytest.mark.parametrize("budget", [{"flops": "60 %"}, {"memory": "70 %", "flops": "80 %"}], ids=str)
@pytest.mark.parametrize("is_lower", [False, True], ids=["single precision", "autocast"])
def test_gradients_that_are_rounding_count_for_nothing_in_any_precision(budget, is_lower) -> None:
    context = (lambda: torch.autocast("cpu", dtype=torch.bfloat16)) if is_lower else contextlib.nullcontext
    model, loss, batches, optimizer = make_transformer(context)
    strategies = (*ROWS, cheapgrad.Rule(nn.Linear, stored=StochasticRounding(4)))
    plan = cheapgrad.plan(model, loss, batches, strategies=strategies, skip_small=False, optimizer=optimizer, **budget)
    assert any("1 parameters is zero but for rounding, the first one is attention.key.bias" in r for r in plan.remarks)
    factors = []
    for name, parameter in model.named_parameters():
        root = (optimizer.state[parameter]["exp_avg_sq"].mean() / (1 - 0.999**24)).sqrt()
        factors.append(0.0 if name == "attention.key.bias" else float(1 / (root + 1e-8)))
    parameters = list(model.parameters())

    def draw(batch):
        gradients = torch.autograd.grad(loss(model, batch), parameters)
        return torch.cat([f * value.flatten() for f, value in zip(factors, gradients, strict=True)]).double()

    exact = [draw(batch) for batch in batches]
    handle = cheapgrad.approximate(model, plan)
    torch.manual_seed(8)
    errors = [(draw(batch) - one).square().sum() for _ in range(20) for batch, one in zip(batches, exact, strict=True)]
    handle.revert()
    noise = float(torch.stack(errors).mean() / torch.stack(exact).var(0).sum())
    # What is passed down is known from differences of forward passes, coarsely in half precision.
    assert plan.predicted.noise_fraction == pytest.approx(noise, rel=0.35 if is_lower else 0.15)


class NoCopy(nn.GELU):
    def __deepcopy__(self, memo: dict) -> None:
        raise RuntimeError("there is only one of it")


class Coarse(nn.Module):
    """Has another gradient in double precision."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else 3 * x


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (NoCopy(), "RuntimeError: there is only one of it"),
        (Coarse(), "a copy in double precision has another gradient"),
    ],
)
def test_models_whose_rounding_nobody_can_tell_are_planned_for_with_a_remark(module, reason) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), module, nn.Linear(24, 5)).train()
    batches = [(x.float(), y) for x, y in make_batches((24,), 4)]
    optimizer = make_optimizer(model)
    plan = cheapgrad.plan(model, loss_fn, batches, strategies=ROWS, skip_small=False, flops="80 %", optimizer=optimizer)
    expected = f"whether a parameter's gradient is nothing but rounding was judged by its size alone: {reason}"
    assert expected in plan.remarks


def test_parameters_in_half_precision_are_no_rounding() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Linear(32, 32), nn.GELU())]
    model = nn.Sequential(*layers, nn.Linear(32, 5)).bfloat16()
    batches = [(x.bfloat16(), y) for x, y in make_batches((32,), 4, examples=64)]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for batch in 4 * batches:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    optimizer.zero_grad()
    plan = cheapgrad.plan(model, loss_fn, batches, strategies=ROWS, skip_small=False, flops="60 %", optimizer=optimizer)
    assert not any("rounding" in remark for remark in plan.remarks)
    assert 0 < plan.predicted.noise_fraction < 10


def test_a_small_parameter_does_not_shorten_the_move_of_all_others() -> None:
    def amplify(dtype):
        torch.manual_seed(1)
        layers = [layer for _ in range(3) for layer in (nn.Linear(24, 24), nn.GELU())]
        model = nn.Sequential(*layers, nn.Linear(24, 5)).double()
        with torch.no_grad():
            # As after a few steps at a low rate from zero.
            model[2].bias.mul_(1e-6)
        optimizer = make_optimizer(model)
        optimizer.state[model[2].bias]["exp_avg_sq"].mul_(1e-2)
        model = model.to(dtype)
        step = make_step(model, optimizer)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        batch = tuple(value.to(dtype) if value.is_floating_point() else value for value in make_batches((24,))[0])
        calls, below = capture_pass(step, layers, batch).calls, PassedDown()
        push_forward(step, batch, calls, below.take, probes=5)
        return torch.tensor([below.amplification(call) for call in calls if call.wants_input])

    torch.testing.assert_close(amplify(torch.float32), amplify(torch.float64), rtol=0.03, atol=0.0)


def test_layers_of_another_optimizer_are_refused_and_derived_weights_left_out() -> None:
    model, batches = make("mlp")
    settings = {"strategies": ROWS, "skip_small": False, "flops": "55 %"}
    head = make_optimizer(model[-1])
    with pytest.raises(OptimizerStateError, match="the Adam does not hold the weight of layer '0', whose noise"):
        cheapgrad.plan(model, loss_fn, batches, optimizer=head, **settings)
    other, _ = make("mlp")
    with pytest.raises(OptimizerStateError, match="the Adam holds none of this model's 16 trainable parameters"):
        cheapgrad.plan(model, loss_fn, batches, optimizer=make_optimizer(other), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model[2])
    plan = cheapgrad.plan(model, loss_fn, batches, optimizer=make_optimizer(model), **settings)
    assert "2: its weight is computed from other parameters, whose units are not its own" in plan.remarks
    assert "2" not in {layer.name for layer in plan.layers}
    with pytest.raises(UnreachableBudgetError, match="; left out: 2: its weight is computed from other parameters"):
        cheapgrad.plan(model, loss_fn, batches, optimizer=make_optimizer(model), **{**settings, "flops": "28 %"})
    lone = nn.Sequential(nn.Linear(24, 5)).double().train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(lone[0])
    with pytest.raises(NoMatchError, match="no layer is left to plan for in units of the optimizer's steps: 0: its"):
        cheapgrad.plan(lone, loss_fn, batches, optimizer=make_optimizer(lone), **settings)


def test_order_of_examples_is_checked_in_plain_units() -> None:
    """A loss whose value is the same in any order, and whose gradient is not."""
    model, batches = make("mlp")
    optimizer = make_optimizer(model, spread=1.0)

    def loss(model, batch):
        outputs = model(batch[0])
        weights = torch.linspace(0, 1, len(outputs), dtype=outputs.dtype)
        return loss_fn(model, batch) + ((outputs - outputs.detach()).sum(1) * weights).mean()

    for given in (None, optimizer):
        with pytest.raises(BatchOrderError, match="the gradient differs by"):
            cheapgrad.plan(model, loss, batches, skip_small=False, flops="55 %", optimizer=given)


def test_a_layer_that_counts_for_nothing_has_noise_below_it_all_the_same() -> None:
    model, batches = make_mlp(4), make_batches((24,))
    optimizer = make_optimizer(model)
    optimizer.state[model[4].weight]["exp_avg_sq"].zero_()
    settings = {
        "strategies": [cheapgrad.Rule("4", cotangent=ColumnSample(keep)) for keep in (0.75, 0.5)],
        "flops": "90 %",
    }
    plan = cheapgrad.plan(model, loss_fn, batches, skip_small=False, optimizer=optimizer, **settings)
    assert plan.separate_noise_fraction > 0.01
    units = optimizer_units(optimizer, [name for name, _ in model.named_parameters()], list(model.parameters()))
    factors = torch.cat(
        [torch.full((value.numel(),), f) for value, f in zip(model.parameters(), units.factors, strict=True)]
    )
    exact = exact_gradients(model, batches)
    cheapgrad.approximate(model, plan)
    noise, _ = measure_weighed(model, batches, exact, factors.double(), draws=40)
    assert plan.predicted.noise_fraction == pytest.approx(noise, rel=0.25)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "the second moments of '0.weight' that the Adam keeps are not finite"),
        (math.inf, "the second moments of '0.weight' that the Adam keeps are not finite"),
        (0.0, "the Adam has seen no gradient but zeros, so that"),
    ],
)
def test_second_moments_without_a_unit_are_named(value, message) -> None:
    model, batches = make("mlp")
    optimizer = make_optimizer(model)
    for parameter in model.parameters() if value == 0 else [model[0].weight]:
        optimizer.state[parameter]["exp_avg_sq"].fill_(value)
    with pytest.raises(OptimizerStateError, match=message):
        cheapgrad.plan(model, loss_fn, batches, skip_small=False, flops="55 %", optimizer=optimizer)


def test_units_of_nothing_but_rounding_are_refused() -> None:
    model, _ = make("mlp")
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(OptimizerStateError, match="the Adam has seen no gradient but zeros and rounding"):
        optimizer_units(make_optimizer(model), names, list(model.parameters()), rounding=names)


def test_parameters_without_entries_and_gradients_in_half_precision_do_no_harm() -> None:
    model, batches = make("mlp")
    model.register_parameter("nothing", nn.Parameter(torch.zeros(0, dtype=torch.float64)))
    settings = {"strategies": ROWS, "skip_small": False, "flops": "55 %"}
    assert cheapgrad.plan(model, loss_fn, batches, optimizer=make_optimizer(model), **settings).layers
    scaled = Units((1000.0, 1e-4)).scale([torch.tensor([100.0]).half(), torch.tensor([1e-4]).half()])
    torch.testing.assert_close(torch.cat(scaled), torch.tensor([1e5, 1e-8]), rtol=1e-2, atol=0.0)


def test_other_optimizers_are_refused_and_the_model_is_left_alone() -> None:
    model, batches = make("mlp")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(OptimizerStateError, match="the SGD has no state for any of the 16 trainable parameters"):
        cheapgrad.plan(model, loss_fn, batches, flops="55 %", optimizer=torch.optim.SGD(model.parameters()))
    with pytest.raises(OptimizerStateError, match=r"optimizer must be a torch\.optim\.Optimizer, but is a str 'adam'"):
        cheapgrad.plan(model, loss_fn, batches, flops="55 %", optimizer="adam")  # type: ignore[arg-type] - refused
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(type(module) is nn.Linear for module in model.modules() if isinstance(module, nn.Linear))
