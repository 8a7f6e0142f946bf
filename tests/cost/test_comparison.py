"""Two reports side by side."""

from __future__ import annotations

import json

import torch
from torch import nn

import cheapgrad
from cheapgrad.cost import CostComparison, Figures, compare
from cheapgrad.sketch import StochasticRounding
from tests.cost.models import Branches


def test_comparison_is_by_module():
    model, x = Branches(), torch.randn(4, 16)
    exact = cheapgrad.scan(model, x)
    model.first.requires_grad_(False)
    changed = compare(exact, cheapgrad.scan(model, x))
    rows = {row.name: row for row in changed.rows}
    product = 2 * 4 * 16 * 32
    assert rows["first"].before == Figures(16 * 32 + 32, product, product, 0, 4 * 16 * 4)
    assert (rows["first"].after.backward_flops, rows["first"].after.saved_bytes) == (0, 0)
    # The other branch holds the input now.
    assert rows["second"].after.saved_bytes == 4 * 16 * 4
    assert changed.saved_bytes_fraction == 1
    assert changed.flops_fraction == (exact.total.flops - product) / exact.total.flops
    assert "" not in rows


def test_modules_of_one_report_only():
    x = torch.randn(4, 16)
    changed = compare(cheapgrad.scan(nn.Sequential(nn.Linear(16, 8)), x), cheapgrad.scan(nn.Linear(16, 8), x))
    rows = {row.name: row for row in changed.rows}
    assert rows["0"].after is None
    assert rows[""].before.flops == 0
    assert rows[""].after.flops == changed.before.flops


def test_comparison_of_a_converted_network():
    model, x = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8)), torch.randn(64, 16)
    exact = cheapgrad.scan(model, x)
    cheapgrad.approximate(model, cheapgrad.Rule("*", stored=StochasticRounding(bits=4)), skip_small=False)
    changed = compare(exact, cheapgrad.scan(model, x))
    assert changed.saved_bytes_fraction == changed.after.saved_bytes / (64 * (16 + 32) * 4) < 0.2
    assert "8.00 KiB → 1.12 KiB" in str(changed)
    assert "not counted, after only: aten::" in str(changed)
    assert CostComparison.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed


def test_comparison_with_nothing_in_it():
    empty = cheapgrad.scan(nn.Identity(), torch.randn(2, 2))
    changed = compare(empty, empty)
    assert (changed.rows, changed.saved_bytes_fraction, changed.flops_fraction) == ((), None, None)
    assert changed.remarks[0].startswith("before: nothing")
