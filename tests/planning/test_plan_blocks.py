"""Blocks of a model in one code: norms, activations, attention and dropout among the choices of a plan."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import cheapgrad
from cheapgrad import recipes
from cheapgrad.cost import measure_held_bytes
from cheapgrad.errors import PlanWarning, UnreachableBudgetError
from cheapgrad.planning import Plan
from cheapgrad.planning.regions import find_regions
from cheapgrad.sketch import StochasticRounding
from tests.planning.networks import (
    Batch,
    SmallViT,
    exact_gradients,
    loss_fn,
    make_batches,
    measure_noise,
    scan_step,
)


def make_vit(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(4)
    model = SmallViT(3, width=32)
    if dropout:
        for block in model.blocks:
            block.norm2 = nn.Sequential(block.norm2, nn.Dropout(dropout))
    return model.double().train()


def held_bytes(model: nn.Module, batch: Batch) -> int:
    return measure_held_bytes(lambda: loss_fn(model, batch), exclude=[model]).total_bytes


def make_plan(model: nn.Module, batches: list[Batch], **budget: Any) -> Plan:
    return cheapgrad.plan(model, loss_fn, batches, skip_small=False, **budget)


@pytest.mark.parametrize("budget", ["60 %", "45 %", "35 %"])
def test_memory_budgets_of_a_transformer_are_kept(budget: str) -> None:
    model, batches = make_vit(), make_batches((6, 12), 4)
    exact, exact_bytes = exact_gradients(model, batches), held_bytes(model, batches[0])
    plan = make_plan(model, batches, memory=budget)
    cheapgrad.approximate(model, plan)
    held = held_bytes(model, batches[0])
    assert held <= float(budget.removesuffix(" %")) / 100 * exact_bytes
    assert plan.predicted.saved_bytes == pytest.approx(held, rel=0.03)
    noise, error = measure_noise(model, batches, exact, draws=20)
    assert error < 0.05 * noise
    assert plan.predicted.noise_fraction == pytest.approx(noise, rel=0.15)


@pytest.mark.parametrize(("memory", "flops"), [("60 %", "70 %"), ("45 %", "80 %"), ("38 %", "90 %")])
def test_budgets_of_bytes_and_flops_are_kept_together(memory: str, flops: str) -> None:
    model, batches = make_vit(), make_batches((6, 12), 4)
    exact, exact_bytes = exact_gradients(model, batches), held_bytes(model, batches[0])
    plan = make_plan(model, batches, memory=memory, flops=flops)
    cheapgrad.approximate(model, plan)
    held, counted = held_bytes(model, batches[0]), scan_step(model, batches[0]).total.backward_flops
    assert held <= float(memory.removesuffix(" %")) / 100 * exact_bytes
    assert plan.predicted.saved_bytes == pytest.approx(held, rel=0.03)
    assert counted <= float(flops.removesuffix(" %")) / 100 * plan.exact.backward_flops
    assert plan.predicted.backward_flops == pytest.approx(counted, rel=0.03)
    noise, error = measure_noise(model, batches, exact, draws=40)
    assert error < 0.05 * noise
    assert plan.predicted.noise_fraction == pytest.approx(noise, rel=0.15)


def test_plans_reach_what_recipes_reach_and_no_further() -> None:
    model, batches = make_vit(), make_batches((6, 12), 4)
    exact_bytes = held_bytes(model, batches[0])
    handle = cheapgrad.approximate(model, recipes.memory(2), skip_small=False)
    least = held_bytes(model, batches[0]) / exact_bytes
    handle.revert()
    with pytest.raises(UnreachableBudgetError, match="memory='1 %' asks for") as raised:
        make_plan(model, batches, memory="1 %")
    nearest = re.search(r"nearest budget is memory='([0-9.]+) %'", str(raised.value))
    assert nearest is not None
    assert float(nearest[1]) / 100 == pytest.approx(least, abs=0.005)
    make_plan(model, batches, memory=f"{nearest[1]} %")


def test_larger_memory_budget_never_adds_noise() -> None:
    model, batches = make_vit(), make_batches((6, 12), 4)
    plans = [make_plan(model, batches, memory=share) for share in (0.36, 0.42, 0.5, 0.6, 0.8, 1.0)]
    noises = [plan.separate_noise_fraction for plan in plans]
    assert noises == sorted(noises, reverse=True)
    assert noises[-1] == 0.0
    assert noises[0] > 0.0


def test_plan_of_blocks_goes_through_json_and_names_its_layers() -> None:
    model, batches = make_vit(), make_batches((6, 12), 2)
    plan = make_plan(model, batches, memory="40 %")
    assert Plan.from_json(plan.to_json()) == plan
    by_name = {layer.name: layer for layer in plan.layers}
    assert isinstance(by_name["blocks.0.norm1"].stored, StochasticRounding)
    assert by_name["blocks.0.qkv"].recompute
    assert by_name["blocks.0.norm1"].module == "LayerNorm(weight [32], bias [32])"
    # A plan that was written before blocks were planned for has no such entry.
    data = plan.to_dict()
    for layer in data["layers"]:
        del layer["recompute"]
    assert not any(layer.recompute for layer in Plan.from_dict(data).layers)


def make_torch_transformer(width: int = 32) -> nn.Module:
    torch.manual_seed(7)
    layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, activation="gelu", batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(12, width), encoder, nn.Flatten(), nn.Linear(6 * width, 5)).double().train()


@pytest.mark.parametrize("make", [make_vit, make_torch_transformer])
def test_plan_of_blocks_is_carried_out_on_its_own_model_without_a_warning(make: Callable[[], nn.Module]) -> None:
    model = make()
    plan = make_plan(model, make_batches((6, 12), 2), memory="45 %")
    assert any(layer.recompute for layer in plan.layers)
    assert all(layer.module for layer in plan.layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PlanWarning)
        cheapgrad.approximate(model, plan).revert()
        # Planned for once, converted in another process.
        cheapgrad.approximate(make(), Plan.from_json(plan.to_json()))


def test_plan_of_blocks_for_another_width_is_carried_out_with_a_warning() -> None:
    plan = make_plan(make_torch_transformer(), make_batches((6, 12), 2), memory="45 %")
    narrow = make_torch_transformer(16)
    norm = "layer '1.layers.1.norm1' is LayerNorm(weight [16], bias [16]), and was LayerNorm(weight [32], bias [32])"
    assert len(plan.find_differences(narrow)) == len(plan.layers)
    assert any(difference.startswith(norm) for difference in plan.find_differences(narrow))
    with pytest.warns(PlanWarning, match=r"'1.layers.0.self_attn' is MultiheadAttention\(in_proj_weight \[48, 16\]"):
        cheapgrad.approximate(narrow, plan)


def test_plan_of_a_wrapped_model_is_that_of_the_model_inside() -> None:
    batches = make_batches((6, 12), 2)
    plan = make_plan(make_vit(), batches, memory="45 %")
    wrapped = nn.DataParallel(make_vit())
    again = make_plan(wrapped, batches, memory="45 %")
    assert again == plan
    cheapgrad.approximate(wrapped, again)
    assert held_bytes(wrapped, batches[0]) == plan.predicted.saved_bytes


def test_rules_of_the_user_keep_blocks_out() -> None:
    model, batches = make_vit(), make_batches((6, 12), 2)
    codes = [cheapgrad.Rule(nn.Linear, stored=StochasticRounding(bits)) for bits in (8, 4, 2)]
    with pytest.raises(UnreachableBudgetError):
        make_plan(model, batches, memory="40 %", strategies=codes)


@pytest.mark.parametrize(
    "make_norm",
    [nn.BatchNorm2d, nn.InstanceNorm2d, lambda channels: nn.GroupNorm(2, channels)],
    ids=["batch", "instance", "group"],
)
@pytest.mark.parametrize("budget", ["85 %", "60 %"])
def test_noise_of_norms_with_codes_of_a_fixed_width_is_told(make_norm: Callable[[int], nn.Module], budget: str) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs in (3, 8):
        layers += [nn.Conv2d(inputs, 8, 3, padding=1), make_norm(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).double().train()
    batches = make_batches((3, 8, 8), 4)
    exact = exact_gradients(model, batches)
    plan = make_plan(model, batches, memory=budget)
    assert plan.layers
    cheapgrad.approximate(model, plan)
    noise, error = measure_noise(model, batches, exact, draws=20)
    assert error < 0.08 * noise
    assert plan.predicted.noise_fraction == pytest.approx(noise, rel=0.4)


def test_dropout_does_not_count_as_noise() -> None:
    # With the masks of another draw, the error of the gradient would be as large as that of the mini-batch.
    model, batches = make_vit(dropout=0.3), make_batches((6, 12), 4)
    plan = make_plan(model, batches, memory="35 %")
    assert 0 < plan.predicted.noise_fraction < 0.02


def test_regions_are_the_blocks_and_the_rest() -> None:
    regions = find_regions(make_vit(), [], skip_small=False)
    assert [(region.path, region.is_rest) for region in regions] == [
        ("blocks.0", False),
        ("blocks.1", False),
        ("blocks.2", False),
        ("", True),
    ]
    assert regions[-1].layers == ("embedding", "norm", "head")
    assert regions[0].layers == tuple(
        f"blocks.0.{name}" for name in ("norm1", "norm2", "qkv", "proj", "expand", "contract")
    )
    # Between linear layers activations are planned for as they are.
    assert find_regions(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), [], skip_small=False) == []
