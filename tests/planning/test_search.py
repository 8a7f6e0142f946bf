"""What is refused is refused by a measurement, and what an error names is accepted."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cheapgrad
from cheapgrad.errors import UnreachableBudgetError
from cheapgrad.planning import search
from cheapgrad.sketch import RowSample
from tests.planning.networks import loss_fn, make_batches, make_mlp

# So many that a search may take one after the other and not be done.
ROWS = [cheapgrad.Rule(nn.Linear, cotangent=RowSample(keep / 50)) for keep in range(10, 50)]


def plan_wide(**budgets: Any) -> cheapgrad.Plan:
    """Plan for an MLP 128-256-256-128 on six batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 128))

    def squares(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - x).square().mean()

    return cheapgrad.plan(model, squares, [torch.randn(64, 128) for _ in range(6)], **budgets)


def plan_small(**budgets: Any) -> cheapgrad.Plan:
    return cheapgrad.plan(make_mlp(3), loss_fn, make_batches((24,), 4), strategies=ROWS, skip_small=False, **budgets)


def read_named(error: UnreachableBudgetError) -> tuple[float, str]:
    """Return the noise and the share of FLOPs that a contradiction names."""
    named = re.search(r"needs noise=([0-9.e-]+), measured.*nearest budget is flops='([0-9.]+ %)'", str(error))
    assert named is not None
    return float(named[1]), named[2]


@pytest.mark.parametrize("above", [1.0, 1.02, 1.1])
def test_a_ceiling_above_the_interval_changes_nothing(above: float) -> None:
    free = plan_wide(flops="60 %")
    assert plan_wide(flops="60 %", noise=above * free.noise_interval[1]).layers == free.layers


@pytest.mark.parametrize("share", [0.97, 0.5, 0.1])
def test_what_a_contradiction_names_is_accepted_and_near(share: float) -> None:
    free = plan_wide(flops="60 %")
    ceiling = share * free.noise_interval[1]
    with pytest.raises(UnreachableBudgetError, match="contradict each other") as raised:
        plan_wide(flops="60 %", noise=ceiling)
    noise, flops = read_named(raised.value)
    assert free.noise_interval[1] <= noise <= 1.01 * free.noise_interval[1]
    assert plan_wide(flops="60 %", noise=noise).layers == free.layers
    assert plan_wide(flops=flops, noise=ceiling).noise_interval[1] <= ceiling
    with pytest.raises(UnreachableBudgetError):
        plan_wide(flops=0.9 * float(flops.removesuffix(" %")) / 100, noise=ceiling)


@pytest.mark.parametrize(("least", "text"), [(0.6004, "none kept it when its step was counted"), (0.9, "at least")])
def test_a_wider_budget_is_named_where_steps_cost_more_than_modelled(
    monkeypatch: pytest.MonkeyPatch, least: float, text: str
) -> None:
    exact = plan_small(flops="100 %").exact.backward_flops
    count = search.count_planned_costs

    def count_more(*arguments: Any) -> Any:
        report = count(*arguments)
        flops = max(report.total.backward_flops, least * exact)
        return dataclasses.replace(report, total=dataclasses.replace(report.total, backward_flops=flops))

    monkeypatch.setattr(search, "count_planned_costs", count_more)
    with pytest.raises(UnreachableBudgetError, match=text) as raised:
        plan_small(flops="60 %")
    nearest = re.search(r"nearest budget is flops='([0-9.]+) %'", str(raised.value))
    assert nearest is not None
    assert 100 * least <= float(nearest[1]) <= 105 * least
    found = plan_small(flops=f"{nearest[1]} %")
    assert found.layers
    assert found.backward_flops_fraction <= float(nearest[1]) / 100


def test_layers_are_left_exact_where_no_plan_keeps_the_ceiling_and_the_plan_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ceiling = 0.5
    measure = search.measure_plan_noise

    def measure_more(step: Any, observed: Any, choices: Any, variance: Any, *rest: Any) -> Any:
        # Whatever is chosen adds a little more than is allowed.
        noise = measure(step, observed, choices, variance, *rest)
        return dataclasses.replace(noise, total=1.009 * noise.total / noise.bound * ceiling * variance.value)

    assert plan_small(noise=ceiling).layers
    monkeypatch.setattr(search, "measure_plan_noise", measure_more)
    exact = plan_small(noise=ceiling)
    assert exact.layers == ()
    assert exact.predicted.noise_fraction == 0.0
    assert "every layer is left exact: of the 4 plans tried for noise=0.5 the last needs noise=0.505" in str(exact)
