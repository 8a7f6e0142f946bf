"""What a handle reads off the ledger: the exact step and the sketched one, counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cheapgrad
from cheapgrad.errors import ConversionError
from cheapgrad.sketch import RowSample, StochasticRounding

ROWS, INPUTS, WIDTH, OUTPUTS = 64, 128, 256, 10


def make():
    # A softmax is no stage of a chain, so that each layer keeps its own row.
    return nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Softmax(1), nn.Linear(WIDTH, OUTPUTS)), torch.randn(ROWS, INPUTS)


@pytest.mark.parametrize("fake", [False, True])
def test_cost_is_that_of_what_really_runs(fake):
    model, x = make()
    handle = cheapgrad.approximate(model, cheapgrad.Rule(cotangent=RowSample(keep=0.5)), skip_small=False)
    rows = {row.name: row for row in handle.measure_cost(x, fake=fake).rows}
    product = 2 * ROWS * INPUTS * WIDTH
    # The batch needs no gradient, so the first layer has one product.
    assert rows["0"].before.backward_flops == product
    assert rows["0"].after.backward_flops == product // 2
    assert rows["2"].before.backward_flops == 4 * ROWS * WIDTH * OUTPUTS
    assert rows["2"].after.backward_flops == 2 * ROWS * WIDTH * OUTPUTS
    assert rows["0"].before.forward_flops == rows["0"].after.forward_flops == product


def test_bytes_are_those_of_the_network():
    model, x = make()
    handle = cheapgrad.approximate(model, cheapgrad.Rule("0", stored=StochasticRounding(bits=8)), skip_small=False)
    cost = handle.measure_cost(x, loss=lambda y: y.square().sum())
    # A byte an entry, and a number of four bytes for each group of 64.
    kept = ROWS * INPUTS + 4 * ROWS * INPUTS // 64
    assert cost.before.saved_bytes - cost.after.saved_bytes == 4 * ROWS * INPUTS - kept


def test_frozen_layers_have_one_product():
    model, x = make()
    handle = cheapgrad.approximate(model, cheapgrad.Rule("2", cotangent=RowSample(keep=0.5)), skip_small=False)
    model[2].weight.requires_grad_(False)
    [row] = [row for row in handle.measure_cost(x).rows if row.name == "2"]
    assert row.before.backward_flops == 2 * ROWS * WIDTH * OUTPUTS == 2 * row.after.backward_flops


def test_measuring_leaves_the_conversion_as_it_was():
    model, x = make()
    handle = cheapgrad.approximate(model, cheapgrad.Rule(cotangent=RowSample(keep=0.5)), skip_small=False)
    cost = handle.measure_cost(x)
    assert handle.measure_cost(x) == cost
    assert all(parameter.grad is None for parameter in model.parameters())
    handle.revert()
    with pytest.raises(ConversionError, match="reverted already"):
        handle.measure_cost(x)


def test_layer_that_carries_the_flops_of_a_chain_is_named():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8), nn.Tanh())
    handle = cheapgrad.approximate(model, cheapgrad.Rule(cotangent=RowSample(keep=0.5)), skip_small=False)
    cost = handle.measure_cost(torch.randn(16, 16))
    rows = {row.name: row for row in cost.rows}
    [ends] = [name for name, row in rows.items() if row.after.backward_flops]
    [remark] = [remark for remark in cost.remarks if "chain" in remark]
    assert f"all their backward FLOPs stand with the last: {ends!r}; compare the totals" in remark
    alone = nn.Linear(16, 32)
    handle = cheapgrad.approximate(alone, cheapgrad.Rule(cotangent=RowSample(keep=0.5)), skip_small=False)
    assert not any("chain" in remark for remark in handle.measure_cost(torch.randn(16, 16)).remarks)
