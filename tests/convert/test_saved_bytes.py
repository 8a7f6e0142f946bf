"""A converted layer holds what its law says, and never more than stock where a weight is frozen."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cheapgrad import Rule, approximate
from cheapgrad.cost import measure_held_bytes
from cheapgrad.sketch import Moment, RowSample, StochasticRounding
from tests.convert.models import HALF, convert, gradients
from tests.ops.chains.networks import ACTIVATIONS
from tests.placements import PLACEMENTS

FLOAT_BYTES = 4


def held_bytes(model, x):
    return measure_held_bytes(lambda: model(x), exclude=[model]).total_bytes


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda placement: placement.name)
def test_what_is_held_is_what_is_predicted(placement):
    layer = nn.Linear(64, 48)
    handle = approximate(layer, placement.rule(), skip_small=False)
    x = torch.randn(8, 5, 64, requires_grad=True)
    measured = held_bytes(layer, x)
    (row,) = handle.rows
    assert row.exact_saved_bytes == 8 * 5 * 64 * FLOAT_BYTES
    assert measured == row.saved_bytes
    if placement.stored is not None:
        shape = layer._cheapgrad.shape
        assert row.saved_bytes == placement.stored.law.saved_bytes(shape, Moment.STORED)


@pytest.mark.parametrize("key", ACTIVATIONS, ids=lambda key: f"{key[0]}{dict(key[1]) or ''}")
def test_what_an_activation_holds_and_held_before_is_what_is_predicted(key):
    stock = nn.Sequential(copy.deepcopy(ACTIVATIONS[key]))
    model = copy.deepcopy(stock)
    handle = approximate(model, Rule(stored=StochasticRounding(4)), skip_small=False)
    x = torch.randn(8, 5, 64, requires_grad=True)
    measured = held_bytes(model, x)
    (row,) = handle.rows
    assert measured == row.saved_bytes
    assert held_bytes(stock, x) == row.exact_saved_bytes


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda placement: placement.name)
def test_a_layer_frozen_after_conversion_holds_nothing(placement):
    layer = nn.Linear(64, 64)
    approximate(layer, placement.rule(), skip_small=False)
    layer.requires_grad_(False)
    x = torch.randn(8, 64, requires_grad=True)
    assert held_bytes(layer, x) == 0
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None


def test_a_layer_whose_input_needs_no_gradient_does_not_hold_its_weight():
    layer = nn.Linear(64, 64)
    convert(layer)
    counted = measure_held_bytes(lambda: layer(torch.randn(8, 64)), exclude=[layer])
    assert counted.excluded_bytes == 0


class Adapter(nn.Module):
    """A frozen layer beside a trainable one of low rank."""

    def __init__(self, width=64, rank=4):
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("rule", [Rule(cotangent=HALF), Rule(stored=StochasticRounding(4), cotangent=RowSample(0.5))])
def test_adapters_over_a_frozen_base_hold_no_more_than_stock(rule):
    model = nn.Sequential(Adapter(), nn.Tanh(), Adapter())
    stock = copy.deepcopy(model)
    handle = approximate(model, rule, skip_small=False)
    x = torch.randn(32, 64)
    assert held_bytes(model, x) <= held_bytes(stock, x)
    assert {row.name: row.status for row in handle.rows}["0.base"] == "converted", "its cotangent can be sketched"
    assert len(gradients(model, x)) == len(gradients(stock, x))


def test_codes_alone_convert_nothing_of_a_frozen_base():
    model = nn.Sequential(Adapter())
    handle = approximate(model, Rule(stored=StochasticRounding(4)), skip_small=False)
    assert {row.name: row.status for row in handle.rows} == {
        "0.base": "skipped",
        "0.down": "converted",
        "0.up": "converted",
    }


def test_under_autocast_the_low_precision_input_is_held():
    layer = nn.Linear(64, 64)
    convert(layer)
    x = torch.randn(16, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert held_bytes(layer, x) == 16 * 64 * 2
