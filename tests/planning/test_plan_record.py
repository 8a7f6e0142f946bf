"""What a plan says of itself, and what it leaves alone."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import cheapgrad
from cheapgrad.errors import (
    BackwardError,
    BatchError,
    BatchOrderError,
    BudgetError,
    CheapgradError,
    ConversionError,
    ForwardError,
    LossError,
    ModelTypeError,
    NoEffectWarning,
    NoMatchError,
    NondeterministicLossError,
    PlanWarning,
    RecordError,
    RuleError,
    UnreachableBudgetError,
)
from cheapgrad.planning import Plan, PlanFigures, PlannedLayer
from cheapgrad.planning.budget import read_flops, read_memory, read_noise
from cheapgrad.sketch import RowSample, StochasticRounding
from tests.planning.networks import Batch, loss_fn, make_batches, make_mlp, make_vit

ROWS = [cheapgrad.Rule(nn.Linear, cotangent=RowSample(keep)) for keep in (0.5, 0.25)]
CODES = [cheapgrad.Rule(nn.Linear, stored=StochasticRounding(4, group=8))]


def make_plan(model: nn.Module | None = None, batches: list[Batch] | None = None, **options: Any) -> Plan:
    arguments: dict[str, Any] = {"strategies": ROWS, "skip_small": False, **options}
    return cheapgrad.plan(
        make_mlp(3) if model is None else model, loss_fn, batches or make_batches((24,), 2), **arguments
    )


def test_plan_goes_through_json() -> None:
    plan = make_plan(flops="60 %")
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.rules == plan.rules
    assert json.loads(plan.to_json())["layers"][0]["cotangent"]["type"] == "RowSample"


def test_table_names_layers_and_totals() -> None:
    text = str(make_plan(flops="60 %"))
    assert "RowSample(keep=0.5)" in text
    assert "backward FLOPs" in text
    assert "c(1 + ω)" in text


@pytest.mark.parametrize("make", [make_mlp, make_vit])
def test_model_is_as_before(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(make(), nn.BatchNorm1d(5)).double().train()
    batches = make_batches((24,) if make is make_mlp else (6, 12), 2)
    loss_fn(model, batches[0]).backward()
    classes = [type(module) for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    cheapgrad.plan(model, loss_fn, batches, strategies=ROWS + CODES, skip_small=False, noise=0.3)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    now = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(now, gradients, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_same_model_gives_the_same_plan() -> None:
    assert make_plan(flops="60 %") == make_plan(flops="60 %")


def test_plan_for_small_layers_converts_them() -> None:
    model = make_mlp(3)
    handle = cheapgrad.approximate(model, make_plan(model, flops="60 %"))
    assert [row.status for row in handle.rows] == ["converted"] * 3


def test_plan_for_other_layers_is_carried_out_with_a_warning() -> None:
    plan = Plan.from_json(make_plan(make_mlp(3), flops="60 %").to_json())
    wider = make_mlp(3)
    name = plan.layers[0].name
    weight = wider.get_submodule(name).weight
    assert isinstance(weight, nn.Parameter)
    rows, columns = weight.shape
    parent, _, last = name.rpartition(".")
    setattr(wider.get_submodule(parent), last, nn.Linear(columns, rows + 1))
    expected = re.escape(f"{name!r} is Linear(weight [{rows + 1}, {columns}], bias [{rows + 1}]), and was Linear(")
    with pytest.warns(PlanWarning, match=f"made for another model: layer {expected}"):
        handle = cheapgrad.approximate(wider, plan)
    assert next(row for row in handle.rows if row.name == name).status == "converted"


def test_plan_that_does_not_say_for_which_layers_is_taken_as_it_is(recwarn: pytest.WarningsRecorder) -> None:
    data = make_plan(flops="60 %").to_dict()
    for layer in data["layers"]:
        del layer["module"]
    cheapgrad.approximate(make_mlp(3), Plan.from_dict(data))
    cheapgrad.approximate(make_mlp(3), make_plan(flops="60 %"))
    assert not [each for each in recwarn if each.category is PlanWarning]


def test_plan_that_changes_nothing_says_so() -> None:
    model = make_mlp(3)
    plan = make_plan(model, flops="100 %")
    assert plan.advice == "the exact step keeps the budget: nothing is to be done"
    with pytest.warns(NoEffectWarning, match="the plan leaves every layer exact"):
        handle = cheapgrad.approximate(model, plan)
    assert handle.rows == ()


def test_budgets_in_bytes_and_flops_are_those_in_shares() -> None:
    share = make_plan(flops="60 %")
    flops = 0.6 * share.exact.backward_flops
    assert make_plan(flops=flops).layers == share.layers
    assert make_plan(flops=f"{flops / 1e3} kFLOP").layers == share.layers
    assert make_plan(flops=0.6).layers == share.layers


@pytest.mark.parametrize(
    ("noise", "is_better"),
    [(0.5, False), (0.9, False), (1.1, True), (3.0, True)],
)
def test_smaller_batch_is_recommended_from_break_even_on(noise: float, is_better: bool) -> None:
    exact = PlanFigures(1000, 100, 200, 0.0)
    layer = PlannedLayer("fc", stored=StochasticRounding(4))
    plan = Plan({"memory": 0.5}, exact, PlanFigures(500, 100, 200, noise), (layer,), 0.01, noise, 2)
    assert plan.cost_times_noise == pytest.approx(0.5 * (1 + noise))
    assert plan.smaller_batch_is_better == is_better
    assert ("take the smaller batch" in plan.advice) == is_better
    # The FLOPs of the forward pass count too: c = (100 + 100) / 300.
    flops = dataclasses.replace(plan, budgets={"flops": 0.5}, predicted=PlanFigures(1000, 100, 100, noise))
    assert flops.cost_times_noise == pytest.approx(2 / 3 * (1 + noise))


def test_noise_ceiling_is_kept_or_refused() -> None:
    free = make_plan(flops="60 %")
    with pytest.raises(UnreachableBudgetError, match="contradict each other") as raised:
        make_plan(flops="60 %", noise=free.separate_noise_fraction / 4)
    nearest = re.search(r"flops='([0-9.]+) %'", str(raised.value).rsplit("nearest", 1)[1])
    assert nearest is not None
    kept = make_plan(flops=f"{nearest[1]} %", noise=free.separate_noise_fraction / 4)
    assert kept.predicted.noise_fraction <= free.separate_noise_fraction / 4
    # More noise allowed than is needed changes nothing.
    assert make_plan(flops="60 %", noise=10.0).layers == free.layers


@pytest.mark.parametrize("budget", [{"flops": "3 %"}, {"memory": "5 %", "strategies": CODES}])
def test_unreachable_budget_names_the_nearest_one(budget: dict[str, Any]) -> None:
    name = next(iter(budget))
    with pytest.raises(UnreachableBudgetError, match=re.escape(f"{name}='{budget[name]}' asks for")) as raised:
        make_plan(**budget)
    nearest = re.search(r"nearest budget is (\w+)='([0-9.]+) %'", str(raised.value))
    assert nearest is not None
    make_plan(**{**budget, name: f"{nearest[2]} %"})


def unchanged_after(call: Callable[[nn.Module], object], error: type[CheapgradError], text: str) -> None:
    model = make_mlp(3)
    classes = [type(module) for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=re.escape(text)):
        call(model)
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training


def planning(loss: Callable[..., Any], **options: Any) -> Callable[[nn.Module], object]:
    arguments: dict[str, Any] = {"flops": "60 %", "strategies": ROWS, "skip_small": False, **options}
    return lambda model: cheapgrad.plan(model, loss, make_batches((24,), 2), **arguments)


def depends_on_order(model: nn.Module, batch: Batch) -> Any:
    weights = torch.linspace(0.0, 1.0, len(batch[1]), dtype=torch.float64)
    return (nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none") * weights).mean()


_coins = torch.Generator().manual_seed(0)


def draws_by_itself(model: nn.Module, batch: Batch) -> Any:
    noise = torch.randn(batch[0].shape, generator=_coins, dtype=torch.float64)
    return loss_fn(model, (batch[0] + noise, batch[1]))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (planning(lambda model, batch: model(batch[0])), LossError, "returned a tensor of shape (24, 5)"),
        (planning(lambda model, batch: 1.5), LossError, "returned 1.5 of type float"),
        (planning(lambda model, batch: loss_fn(model, batch).detach()), LossError, "that does not"),
        (planning(lambda model, batch: loss_fn(model, batch) * 1j), LossError, "returned a tensor of torch.complex128"),
        (planning(depends_on_order), BatchOrderError, "for the same 24 examples in another order"),
        (planning(draws_by_itself), NondeterministicLossError, "from the same random state"),
        (planning(loss_fn, flops=None), BudgetError, "plan needs a budget"),
        (planning(loss_fn, flops="sixty"), BudgetError, "cannot read flops='sixty'"),
        (planning(loss_fn, strategies=[]), RuleError, "strategies is empty"),
        (planning(loss_fn, strategies=RowSample(0.5)), RuleError, "but got RowSample(keep=0.5) of type RowSample"),
        (planning(loss_fn, strategies=[ROWS[0], 5]), RuleError, "but got 5 of type int"),
        (lambda model: cheapgrad.plan(model, loss_fn, None, flops=0.6), BatchError, "but got a NoneType"),  # type: ignore[arg-type]
        (lambda model: cheapgrad.plan(model, loss_fn, 4, flops=0.6), BatchError, "but got an int 4"),  # type: ignore[arg-type]
        (planning(loss_fn, strategies=[cheapgrad.Rule("*.q", cotangent=RowSample(0.5))]), NoMatchError, "'*.q'"),
        (planning(loss_fn, strategies=None, skip_small=True), NoMatchError, "no layer of Sequential takes"),
        (lambda model: cheapgrad.plan(model, loss_fn, make_batches((24,), 1), flops=0.6), BatchError, "but got 1"),
    ],
)
def test_bad_input_is_named_and_leaves_the_model_alone(
    call: Callable[[nn.Module], object], error: type[CheapgradError], text: str
) -> None:
    unchanged_after(call, error, text)


@pytest.mark.parametrize("number", [0, 1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_batches_without_a_finite_loss_are_named(number: int, value: float) -> None:
    batches = make_batches((24,), 4)
    batches[number][0][5, 7] = value
    with pytest.raises(LossError, match=re.escape(f"the loss of batches[{number}] is nan")):
        make_plan(batches=batches, flops="60 %")


def test_infinite_losses_are_named_too() -> None:
    def infinite(model: nn.Module, batch: Batch) -> Any:
        return loss_fn(model, batch) + math.inf

    unchanged_after(planning(infinite), LossError, "the loss of batches[0] is inf")


def test_gradients_that_are_not_finite_are_named_though_the_loss_is() -> None:
    def kinked(model: nn.Module, batch: Batch) -> Any:
        # The root of 0 has the slope ∞, and the loss is finite.
        return loss_fn(model, batch) + 0.0 * (next(model.parameters())[0, 0] * 0.0).sqrt()

    unchanged_after(planning(kinked), BatchError, "the gradient of '0.weight' is not finite in batches[0]")


def test_a_loss_that_raises_is_named_and_its_error_is_the_cause() -> None:
    failure = OSError("disk full")

    def raises(model: nn.Module, batch: Batch) -> Any:
        model(batch[0])
        raise failure

    unchanged_after(planning(raises), ForwardError, "the loss function raised OSError: disk full")
    with pytest.raises(ForwardError) as caught:
        planning(raises)(make_mlp(3))
    assert caught.value.__cause__ is failure


def test_a_backward_pass_that_raises_is_named_and_its_error_is_the_cause() -> None:
    failure, first = OSError("no kernel"), make_batches((24,), 2)[0][0]

    def fail(grad: torch.Tensor) -> torch.Tensor:
        raise failure

    def raises(model: nn.Module, batch: Batch) -> Any:
        logits = model(batch[0])
        # Not for the first batch, whose costs are counted before any gradient is taken.
        if logits.requires_grad and not torch.equal(batch[0], first):
            logits.register_hook(fail)
        return nn.functional.cross_entropy(logits, batch[1])

    unchanged_after(planning(raises), BackwardError, "the backward pass raised OSError: no kernel")
    with pytest.raises(BackwardError) as caught:
        planning(raises)(make_mlp(3))
    assert caught.value.__cause__ is failure


def test_a_single_rule_needs_no_list() -> None:
    assert make_plan(flops="70 %", strategies=ROWS[0]) == make_plan(flops="70 %", strategies=[ROWS[0]])
    assert make_plan(flops="70 %", strategies=(rule for rule in ROWS)) == make_plan(flops="70 %")


def test_batches_of_different_shapes_are_refused() -> None:
    batches = [make_batches((24,), 1, examples)[0] for examples in (64, 4, 64, 8)]
    text = "batches[0] have the shapes [(64, 24), (64,)] and those of batches[1] [(4, 24), (4,)]"
    with pytest.raises(BatchError, match=re.escape(text)):
        make_plan(batches=batches, flops="60 %")


def test_an_order_that_cannot_be_checked_is_remarked() -> None:
    def time_first(model: nn.Module, batch: Batch) -> Any:
        return nn.functional.cross_entropy(model(batch[0]).mean(0), batch[1])

    batches = [(x.transpose(0, 1).contiguous(), y) for x, y in make_batches((6, 24), 4)]
    plan = cheapgrad.plan(make_mlp(3), time_first, batches, flops="60 %", strategies=ROWS, skip_small=False)
    remark = "first axes of its tensors should be as long as there are examples, two or more, but are 6 and 24"
    assert any(remark in one for one in plan.remarks)
    assert remark in str(plan)
    assert "nobody checked" not in str(make_plan(batches=make_batches((24,), 4), flops="60 %"))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_time_first_batches_are_refused_before_anything_was_learned(seed: int, dropout: float) -> None:
    # The loss of a network that has learned nothing is about log(classes), in whatever order it reads.
    def loss_of_sequences(model: nn.Module, batch: Batch) -> Any:
        states, _ = model[0](batch[0])
        return nn.functional.cross_entropy(model[1](states).flatten(0, 1), batch[1].flatten())

    torch.manual_seed(seed)
    batches = [(torch.randn(12, 12, 6), torch.randint(0, 10, (12, 12))) for _ in range(2)]
    for batch_first in (True, False):
        model = nn.Sequential(nn.GRU(6, 16, 2, dropout=dropout, batch_first=batch_first), nn.Linear(16, 10))
        call = functools.partial(
            cheapgrad.plan, model, loss_of_sequences, batches, flops="96 %", strategies=ROWS, skip_small=False
        )
        if batch_first:
            assert call().layers
        else:
            with pytest.raises(BatchOrderError, match="the gradient differs by"):
                call()


class _InTrainingOnly(torch.autograd.Function):
    """The identity, whose backward pass works in training mode alone, as that of recurrent networks on CUDA does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, training: bool) -> torch.Tensor:
        ctx.training = training
        return x.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> Any:
        if not ctx.training:
            raise RuntimeError("backward can only be called in training mode")
        return cotangent, None


class _Shaken(torch.autograd.Function):
    """The identity, whose backward pass draws."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> Any:
        return cotangent * (1 + 0.5 * torch.randn_like(cotangent))


def _train_only(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return _InTrainingOnly.apply(x, model.training)


def _detach_in_evaluation(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x if model.training else x.detach()


def _shake(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return _Shaken.apply(x)


@pytest.mark.parametrize("change", [_train_only, _detach_in_evaluation, _shake])
def test_losses_alone_are_compared_where_the_gradient_tells_nothing(change: Callable[..., torch.Tensor]) -> None:
    def changed(model: nn.Module, batch: Batch) -> Any:
        return nn.functional.cross_entropy(change(model, model(batch[0])), batch[1])

    def in_order(model: nn.Module, batch: Batch) -> Any:
        weights = torch.linspace(0.0, 1.0, len(batch[1]), dtype=torch.float64)
        losses = nn.functional.cross_entropy(change(model, model(batch[0])), batch[1], reduction="none")
        return (losses * weights).mean()

    batches = make_batches((24,), 4)
    plan = cheapgrad.plan(make_mlp(3), changed, batches, flops="60 %", strategies=ROWS, skip_small=False)
    assert any("changes its gradient was not checked: " in remark for remark in plan.remarks)
    with pytest.raises(BatchOrderError, match="for the same 24 examples in another order"):
        cheapgrad.plan(make_mlp(3), in_order, batches, flops="60 %", strategies=ROWS, skip_small=False)


class _Checkpointed(nn.Module):
    """A layer that is run again in the backward pass."""

    def __init__(self, inner: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, x: torch.Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


def test_checkpointed_layers_are_planned_for_as_others_are() -> None:
    batches = make_batches((24,), 4)
    settings: dict[str, Any] = {"strategies": ROWS, "skip_small": False, "flops": "60 %"}
    plain = cheapgrad.plan(make_mlp(3), loss_fn, batches, **settings)
    model = make_mlp(3)
    for position in (0, 2):
        model[position] = _Checkpointed(model[position], use_reentrant=False)
    plan = cheapgrad.plan(model, loss_fn, batches, **settings)
    assert plan.predicted.noise_fraction == pytest.approx(plain.predicted.noise_fraction, rel=0.2)
    model = nn.Sequential(_Checkpointed(make_mlp(3), use_reentrant=True))
    reentrant = [(x.requires_grad_(), y) for x, y in batches]
    with pytest.raises(BatchError, match="no gradient reaches any parameter"):
        cheapgrad.plan(model, loss_fn, reentrant, **settings)


def test_convolutions_are_planned_for_under_autocast() -> None:
    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])

    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 8, 3, padding=1), nn.GELU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(512, 5)).train()
    batches = [(x.float(), y) for x, y in make_batches((3, 8, 8), 4)]
    plan = cheapgrad.plan(model, loss, batches, skip_small=False, flops="80 %")
    assert plan.predicted.noise_fraction > 0


def test_buffers_of_a_spectral_norm_are_left_alone() -> None:
    model = make_mlp(3)
    nn.utils.parametrizations.spectral_norm(model[2])
    before = {name: value.clone() for name, value in model.named_buffers()}
    cheapgrad.plan(model, loss_fn, make_batches((24,), 4), strategies=ROWS, skip_small=False, flops="90 %")
    assert before
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def _list_in_evaluation(model: nn.Module, scores: torch.Tensor) -> Any:
    return scores if model.training else [scores]


def _nothing_in_evaluation(model: nn.Module, scores: torch.Tensor) -> torch.Tensor:
    return scores if model.training else scores * math.nan


@pytest.mark.parametrize(
    ("change", "reason"),
    [(_list_in_evaluation, "the loss function raised TypeError"), (_nothing_in_evaluation, "the loss is nan")],
)
def test_models_that_do_something_else_in_evaluation_mode_are_planned_with_a_remark(
    change: Callable[..., Any], reason: str
) -> None:
    def changed(model: nn.Module, batch: Batch) -> Any:
        return nn.functional.cross_entropy(change(model, model(batch[0])), batch[1])

    plan = cheapgrad.plan(make_mlp(3), changed, make_batches((24,), 4), flops="60 %", strategies=ROWS, skip_small=False)
    (remark,) = (remark for remark in plan.remarks if remark.startswith("nobody checked"))
    assert "in evaluation mode" in remark
    assert reason in remark


@pytest.mark.parametrize("seed", range(4))
def test_a_loss_that_cancels_to_rounding_has_no_order(seed: int) -> None:
    def surrogate(model: nn.Module, batch: Batch) -> Any:
        chosen = model(batch[0].float()).log_softmax(1).gather(1, batch[1][:, None])[:, 0]
        advantages = batch[0][:, 0].float()
        advantages = (advantages - advantages.mean()) / advantages.std()
        return -((chosen - chosen.detach()).exp() * advantages).mean()

    torch.manual_seed(seed)
    plan = cheapgrad.plan(
        make_mlp(3).float(), surrogate, make_batches((24,), 4), flops="60 %", strategies=ROWS, skip_small=False
    )
    assert not any("order" in remark for remark in plan.remarks)


def test_losses_are_compared_in_their_own_precision() -> None:
    model = make_mlp(3).bfloat16()

    def in_order(model: nn.Module, batch: Batch) -> Any:
        weights = torch.linspace(0.0, 1.0, len(batch[1]))
        # The loss alone tells: 4096 units in the last place of a parameter are several times the loss.
        scores = _detach_in_evaluation(model, model(batch[0].bfloat16()).float())
        losses = nn.functional.cross_entropy(scores, batch[1], reduction="none")
        return (losses * weights).mean()

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model[-1].bias.copy_(torch.arange(5))
    with pytest.raises(BatchOrderError):
        cheapgrad.plan(model, in_order, make_batches((24,), 4), flops="60 %", strategies=ROWS, skip_small=False)


def test_a_loss_that_draws_in_evaluation_mode_too_has_an_order_that_nobody_checked() -> None:
    def always_drops(model: nn.Module, batch: Batch) -> Any:
        return loss_fn(model, (nn.functional.dropout(batch[0], 0.1, training=True), batch[1]))

    plan = cheapgrad.plan(
        make_mlp(3), always_drops, make_batches((24,), 4), flops="60 %", strategies=ROWS, skip_small=False
    )
    expected = "nobody checked whether the order of the batch's examples changes its loss: it draws random numbers in"
    assert any(remark.startswith(expected) for remark in plan.remarks)


def test_models_that_cannot_be_planned_for_are_refused() -> None:
    with pytest.raises(ModelTypeError, match="'mlp' of type str"):
        cheapgrad.plan("mlp", loss_fn, [], flops=0.5)  # type: ignore[arg-type]
    model = make_mlp(3)
    with pytest.raises(ConversionError, match="evaluation mode"):
        make_plan(model.eval(), flops=0.5)
    handle = cheapgrad.approximate(model.train(), ROWS[0], skip_small=False)
    with pytest.raises(ConversionError, match="layer '0'"):
        make_plan(model, flops=0.5)
    handle.revert()


@pytest.mark.parametrize(
    ("read", "given", "value"),
    [
        (lambda given: read_memory(given, 2000.0), "60 %", 1200.0),
        (lambda given: read_memory(given, 2000.0), "0.5", 1000.0),
        (lambda given: read_memory(given, 2000.0), 0.5, 1000.0),
        (lambda given: read_memory(given, 2000.0), "4 GiB", 4 * 2**30),
        (lambda given: read_memory(given, 2000.0), "1.5MB", 1.5e6),
        (lambda given: read_memory(given, 2000.0), 1234, 1234.0),
        (lambda given: read_flops(given, 2000.0), "3 GFLOP", 3e9),
        (lambda given: read_flops(given, 2000.0), 2e12, 2e12),
        (read_noise, "5%", 0.05),
        (read_noise, 0.0, 0.0),
        (read_noise, 2, 2.0),
    ],
)
def test_budgets_are_understood(read: Callable[[Any], Any], given: Any, value: float) -> None:
    assert read(given).value == pytest.approx(value)


@pytest.mark.parametrize(
    ("read", "given", "text"),
    [
        (lambda given: read_memory(given, 2000.0), "160 %", "must be in (0, 1], but got '160 %'"),
        (lambda given: read_memory(given, 2000.0), 0.0, "must be in (0, 1], but got 0.0"),
        (lambda given: read_memory(given, 2000.0), "4 GFLOP", "memory has no unit 'GFLOP'"),
        (lambda given: read_memory(given, 2000.0), True, "but got True"),
        (lambda given: read_flops(given, 2000.0), "4 GiB", "flops has no unit 'GiB'"),
        (lambda given: read_flops(given, 2000.0), float("nan"), "but got nan"),
        (read_noise, "5 GiB", "noise has no unit 'GiB'"),
        (read_noise, -0.1, "but got -0.1"),
    ],
)
def test_budgets_that_are_none_are_named(read: Callable[[Any], Any], given: Any, text: str) -> None:
    with pytest.raises(BudgetError, match=re.escape(text)):
        read(given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "this is no JSON"),
        ('{"kind": "something"}', "but are 'something' and None"),
        ("[1]", "but are 'list' and None"),
        ('{"kind": "cheapgrad.plan", "version": 1}', "this plan is damaged: KeyError"),
    ],
)
def test_damaged_plans_are_named(text: str, message: str) -> None:
    with pytest.raises(RecordError, match=re.escape(message)):
        Plan.from_json(text)
