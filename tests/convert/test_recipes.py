"""Recipes: rules for a whole model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cheapgrad import Rule, approximate, recipes
from cheapgrad.errors import BudgetError, NoEffectWarning, RuleError
from cheapgrad.sketch import OrderedPivotal, RowSample, StochasticRounding


def network():
    return nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))


@pytest.mark.parametrize("recipe", [recipes.memory(), recipes.speed(), recipes.both()], ids=["memory", "speed", "both"])
def test_a_recipe_reaches_every_layer(recipe):
    handle = approximate(network(), recipe)
    assert [row.status for row in handle.rows] == ["converted"] * 4


def test_rules_behind_a_recipe_win():
    handle = approximate(network(), recipes.both(bits=8, keep=0.25), Rule("3", cotangent=RowSample(0.75)))
    assert handle.rows[1].stored == repr(StochasticRounding(8))
    assert handle.rows[1].cotangent == repr(RowSample(0.25, design=OrderedPivotal()))
    assert (handle.rows[3].stored, handle.rows[3].cotangent) == (None, repr(RowSample(0.75)))


def test_a_full_budget_runs_stock_code_and_says_so():
    model, x = network(), torch.randn(16, 128)
    exact = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with pytest.warns(NoEffectWarning, match="full budget"):
        approximate(model, recipes.speed(keep=1.0))
    for left, right in zip(exact, torch.autograd.grad(model(x).square().sum(), list(model.parameters())), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    "make", [lambda: recipes.memory(bits=3), lambda: recipes.speed(keep=0), lambda: recipes.both(keep=1.5)]
)
def test_budgets_out_of_range_are_named(make):
    with pytest.raises(BudgetError):
        make()


def test_what_is_no_rule_is_refused_also_inside_a_sequence():
    model = network()
    with pytest.raises(RuleError, match=r"must be cheapgrad.Rule objects, but got 'speed' of type str"):
        approximate(model, recipes.speed(), ["speed"])  # type: ignore[list-item] - the mistake
    assert type(model[1]) is nn.Linear
