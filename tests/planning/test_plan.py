"""A plan keeps its word: bytes, FLOPs and noise, measured with code that knows nothing of plans."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import cheapgrad
from cheapgrad.cost import measure_held_bytes
from cheapgrad.planning import Frontier, Option
from cheapgrad.sketch import ColumnSample, RowSample, StochasticRounding
from tests.planning.networks import (
    exact_gradients,
    loss_fn,
    make_batches,
    make_convolutions,
    make_mlp,
    make_vit,
    measure_noise,
    scan_step,
)

ROWS = tuple(cheapgrad.Rule(nn.Linear, cotangent=RowSample(keep)) for keep in (0.75, 0.5, 0.25))
CODES = tuple(cheapgrad.Rule(nn.Linear, stored=StochasticRounding(bits, group=8)) for bits in (8, 4, 2))
COLUMNS = tuple(cheapgrad.Rule("*", cotangent=ColumnSample(keep)) for keep in (0.75, 0.5))

NETWORKS = {
    "mlp": (make_mlp, (24,)),
    "vit": (make_vit, (6, 12)),
    "convolutions": (make_convolutions, (3, 8, 8)),
}
CASES = {
    "mlp, rows": ("mlp", {"flops": "55 %"}, ROWS),
    "mlp, codes": ("mlp", {"memory": "70 %"}, CODES),
    "mlp, columns": ("mlp", {"flops": "70 %"}, COLUMNS),
    "vit, few rows": ("vit", {"flops": "45 %"}, ROWS),
    "vit, codes": ("vit", {"memory": "80 %"}, CODES),
    "vit, both": ("vit", {"memory": "75 %", "flops": "65 %"}, ROWS + CODES),
    "vit, noise": ("vit", {"noise": 0.2}, ROWS + CODES),
    "convolutions, examples": ("convolutions", {"flops": "65 %"}, None),
    "convolutions, codes": ("convolutions", {"memory": "70 %"}, None),
}


def make(name: str, count: int = 4) -> tuple[nn.Module, list[Any]]:
    build, shape = NETWORKS[name]
    return build(), make_batches(shape, count)


@pytest.mark.parametrize("case", CASES)
def test_plan_keeps_its_word(case: str) -> None:
    network, budgets, strategies = CASES[case]
    model, batches = make(network)
    exact = exact_gradients(model, batches)
    plan = cheapgrad.plan(model, loss_fn, batches, strategies=strategies, skip_small=False, **budgets)
    exact_bytes = measure_held_bytes(lambda: loss_fn(model, batches[0]), exclude=[model]).total_bytes
    # PyTorch's counter counts grouped convolutions too often, and products with vectors (of scores) not at all.
    count_flops = scan_flops if strategies in (None, COLUMNS) else count_backward_flops
    exact_flops = count_flops(model, batches[0])
    cheapgrad.approximate(model, plan)
    held = measure_held_bytes(lambda: loss_fn(model, batches[0]), exclude=[model]).total_bytes
    assert plan.exact.saved_bytes == exact_bytes
    assert plan.predicted.saved_bytes == pytest.approx(held, rel=0.03)
    flops = count_flops(model, batches[0])
    assert plan.exact.backward_flops == pytest.approx(exact_flops, rel=1e-3)
    assert plan.predicted.backward_flops == pytest.approx(flops, rel=0.03)
    assert flops <= share(budgets.get("flops", "100 %")) * exact_flops
    assert held <= share(budgets.get("memory", "100 %")) * exact_bytes
    noise, error = measure_noise(model, batches, exact, draws=40 if case == "mlp, rows" else 12)
    assert error < 0.06 * noise
    assert plan.predicted.noise_fraction == pytest.approx(noise, rel=0.15)
    assert noise <= 1.15 * budgets.get("noise", float("inf"))


def test_noise_is_not_the_sum_of_what_each_layer_adds_alone() -> None:
    # The plan above would fail by a third with a sum: sketches meet the noise of those above them.
    model, batches = make("vit")
    plan = cheapgrad.plan(model, loss_fn, batches, strategies=ROWS, skip_small=False, flops="45 %")
    assert plan.predicted.noise_fraction > 1.25 * plan.separate_noise_fraction


@pytest.mark.parametrize(("network", "strategies", "budget"), [("mlp", CODES, "memory"), ("vit", ROWS, "flops")])
def test_larger_budget_never_adds_noise(network: str, strategies: Any, budget: str) -> None:
    model, batches = make(network, count=2)
    noises, costs = [], []
    for given in (0.55, 0.65, 0.75, 0.9, 1.0):
        plan = cheapgrad.plan(model, loss_fn, batches, strategies=strategies, skip_small=False, **{budget: given})
        noises.append(plan.separate_noise_fraction)
        costs.append(plan.saved_bytes_fraction if budget == "memory" else plan.backward_flops_fraction)
        assert costs[-1] <= given
    assert noises == sorted(noises, reverse=True)
    assert costs == sorted(costs)
    assert noises[-1] == 0.0
    assert plan.layers == ()


def test_larger_noise_ceiling_saves_at_least_as_much() -> None:
    model, batches = make("mlp")
    costs = []
    for ceiling in (0.002, 0.02, 0.1, 0.4, 2.0):
        plan = cheapgrad.plan(model, loss_fn, batches, strategies=ROWS + CODES, skip_small=False, noise=ceiling)
        assert plan.predicted.noise_fraction <= ceiling
        costs.append(plan.saved_bytes_fraction + plan.backward_flops_fraction)
    assert costs == sorted(costs, reverse=True)
    assert costs[0] < 2.0
    assert costs[-1] < 0.8 * costs[0]


@pytest.mark.parametrize("case", ["vit, both", "convolutions, codes"])
def test_held_parts_are_those_of_the_exact_and_the_planned_step(case: str) -> None:
    network, budgets, strategies = CASES[case]
    model, batches = make(network, count=2)
    plan = cheapgrad.plan(model, loss_fn, batches, strategies=strategies, skip_small=False, **budgets)
    exact = scan_step(model, batches[0])
    cheapgrad.approximate(model, plan)
    planned = scan_step(model, batches[0])
    for report, held, whole in (
        (exact, {(part.module, part.operation): part.exact_bytes for part in plan.held}, plan.exact),
        (planned, {(part.module, part.operation): part.planned_bytes for part in plan.held}, plan.predicted),
    ):
        assert sum(held.values()) == whole.saved_bytes
        for name, _ in model.named_modules():
            row = report.row(f"model.{name}" if name else "model")
            assert sum(amount for (module, _), amount in held.items() if module == name) == row.saved_bytes
        assert sum(amount for (module, _), amount in held.items() if module == "(loss)") == report.row("").saved_bytes
        for operation in {operation for _, operation in held}:
            counted = sum(cost.saved_bytes for cost in report.operations if cost.operation == operation)
            assert sum(amount for (_, other), amount in held.items() if other == operation) == counted


def test_choice_is_that_of_an_exhaustive_search() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        items = []
        for _ in range(6):
            gains = torch.rand(4, 2, generator=generator, dtype=torch.float64).tolist()
            items.append([Option(0.0, 0.0, "none"), *[Option(-cost, noise, str(cost)) for cost, noise in gains]])
        frontier = Frontier(items)
        every = [
            (sum(option.cost for option in chosen), sum(option.noise for option in chosen))
            for chosen in itertools.product(*items)
        ]
        for budget in (-4.0, -2.5, -1.0, -0.1):
            within = [noise for cost, noise in every if cost <= budget]
            found = frontier.least_noise(budget)
            assert (found is None) == (not within)
            if found is not None:
                assert found.noise == pytest.approx(min(within))
                assert found.cost <= budget + 1e-12


def test_frontier_of_many_items_is_near_the_best_and_within_budget() -> None:
    generator = torch.Generator().manual_seed(2)
    items = []
    for _ in range(60):
        scale = float(torch.rand((), generator=generator)) + 0.1
        items.append([Option(0.0, 0.0), *[Option(-share, scale * share**2, share) for share in (0.3, 0.6, 1.0)]])
    found = Frontier(items).least_noise(-30.0)
    assert found is not None
    assert found.cost <= -30.0
    # The relaxation by shares of options is a lower bound of every combination.
    hull = sorted(
        (slope, width)
        for options in items
        for slope, width in (
            ((after.noise - before.noise) / (before.cost - after.cost), before.cost - after.cost)
            for before, after in itertools.pairwise(options)
        )
    )
    missing, bound = 30.0, 0.0
    for slope, width in hull:
        taken = min(width, missing)
        bound, missing = bound + slope * taken, missing - taken
    assert bound <= found.noise <= 1.02 * bound


def make_layers_apart(*widths: int) -> nn.Module:
    """Return linear layers that have nothing in common: a norm that is not converted ends every chain."""
    torch.manual_seed(9)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.LayerNorm(inputs), nn.Linear(inputs, outputs)]
    return nn.Sequential(*layers).double().train()


def measure_every(
    model: nn.Module, rules_of_layers: Sequence[Sequence[cheapgrad.Rule]], measure: Callable[[], int]
) -> Iterator[tuple[int, tuple[cheapgrad.Rule, ...]]]:
    """Yield what a step costs with every combination of rules, at most one for each layer, with the rules."""
    for chosen in itertools.product(*([None, *rules] for rules in rules_of_layers)):
        rules = tuple(rule for rule in chosen if rule is not None)
        handle = cheapgrad.approximate(model, rules, skip_small=False) if rules else None
        yield measure(), rules
        if handle is not None:
            handle.revert()


def test_plan_of_a_small_model_is_the_best_of_all_rules() -> None:
    model, batches = make_layers_apart(24, 16, 32, 8, 5), make_batches((24,), 2)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    codes = [StochasticRounding(bits, group=8) for bits in (8, 4, 2)]
    rules = [[cheapgrad.Rule(name, stored=code) for code in codes] for name in names]
    noises = {rule: predict_alone(model, batches, rule) for of_layer in rules for rule in of_layer}
    every = [
        (held, sum(noises[rule] for rule in chosen))
        for held, chosen in measure_every(
            model, rules, lambda: measure_held_bytes(lambda: loss_fn(model, batches[0]), exclude=[model]).total_bytes
        )
    ]
    exact = every[0][0]
    gradients = torch.stack(exact_gradients(model, batches))
    variance = float(gradients.var(0).sum())
    for budget in (0.95, 0.8, 0.7, 0.6):
        best = min(noise for held, noise in every if held <= budget * exact)
        plan = cheapgrad.plan(model, loss_fn, batches, strategies=CODES, skip_small=False, memory=budget)
        assert plan.separate_noise_fraction == pytest.approx(best / variance, rel=1e-6)
        assert plan.predicted.saved_bytes <= budget * exact


def test_plan_of_rows_on_six_layers_is_the_best_of_all_rules() -> None:
    model, batches = make_layers_apart(24, 16, 32, 24, 8, 24, 5), make_batches((24,), 2)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    # Two options for every other layer, one for the rest: 216 combinations.
    rules = [
        [cheapgrad.Rule(name, cotangent=RowSample(keep)) for keep in ((0.5, 0.25) if position % 2 else (0.5,))]
        for position, name in enumerate(names)
    ]
    every = list(measure_every(model, rules, lambda: count_backward_flops(model, batches[0])))
    noises = {}
    for flops, chosen in every:
        if len(chosen) == 1:
            # What a rule adds by itself, in its own layer and below.
            alone = cheapgrad.plan(model, loss_fn, batches, strategies=chosen, skip_small=False, flops=flops)
            assert [layer.cotangent for layer in alone.layers] == [rule.cotangent for rule in chosen]
            noises[chosen[0]] = alone.separate_noise_fraction
    assert len(noises) == 9
    exact, all_rules = every[0][0], [rule for of_layer in rules for rule in of_layer]
    for budget in (0.92, 0.8, 0.7, 0.6, 0.5):
        best = min(sum(noises[rule] for rule in chosen) for flops, chosen in every if flops <= budget * exact)
        plan = cheapgrad.plan(model, loss_fn, batches, strategies=all_rules, skip_small=False, flops=budget)
        assert plan.separate_noise_fraction == pytest.approx(best, rel=1e-6)
        assert plan.predicted.backward_flops <= budget * exact


def predict_alone(model: nn.Module, batches: list[Any], rule: cheapgrad.Rule) -> float:
    """Return the variance of one layer's law, by the handle of a converted model."""
    handle = cheapgrad.approximate(model, rule, skip_small=False)
    variances = [handle.predict(lambda batch=batch: loss_fn(model, batch))[0].weight_variance for batch in batches]
    handle.revert()
    return sum(variance or 0.0 for variance in variances) / len(batches)


def share(text: str) -> float:
    return float(text.removesuffix(" %")) / 100


def scan_flops(model: nn.Module, batch: Any) -> int:
    return scan_step(model, batch).total.backward_flops


def count_backward_flops(model: nn.Module, batch: Any) -> int:
    loss = loss_fn(model, batch)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    model.zero_grad()
    return counter.get_total_flops()
