"""Two reports side by side."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import cheapgrad
from cheapgrad.cost import CostComparison, CostReport, Figures, cheap_gradient, compare
from cheapgrad.errors import ArgumentError, BudgetError, RecordError
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


def test_table_of_no_lines_is_all_of_them_as_on_the_command_line():
    report = cheapgrad.scan(Branches(), torch.randn(4, 16))
    changed = compare(report, report)
    for record in (report, changed):
        assert record.table(top=0) == record.table(top=None) != record.table(top=1)
        for top in (-1, "a", 1.5):
            with pytest.raises(BudgetError, match=f"top must be a whole number of at least 0, but got {top!r}"):
                record.table(top=top)


def test_what_is_no_report_is_refused():
    report = cheapgrad.scan(nn.Linear(4, 4), torch.randn(2, 4))
    with pytest.raises(ArgumentError, match="after must be of type CostReport, but got a dict of 9; give what"):
        compare(report, report.to_dict())
    with pytest.raises(ArgumentError, match="before must be of type CostReport, but got a Linear"):
        compare(nn.Linear(4, 4), report)
    with pytest.raises(ArgumentError, match="report must be of type CostReport, but got a Linear; give what"):
        cheap_gradient(nn.Linear(4, 4))


def replaced(data, path, value):
    """Return a copy of nested data with one entry replaced."""
    copy = json.loads(json.dumps(data))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copy


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("version",), 99, "are a cheapgrad.scan of version 99, and this cheapgrad reads version 1"),
        (("kind",), "cheapgrad.plan", "are of kind 'cheapgrad.plan', not 'cheapgrad.scan'"),
        (("rows", 0, "saved_bytes"), -1, r"rows\[0\]\.saved_bytes must be at least 0, but is -1"),
        (("total", "saved_bytes"), "12", "total.saved_bytes must be of type int, but is a str '12'"),
        (("total", "forward_flops"), 1.5, "total.forward_flops must be of type int, but is a float 1.5"),
        (("rows", 0, "inclusive"), None, r"rows\[0\].inclusive must be a dictionary, but is a NoneType"),
        (("operations", 0, "call"), 3, r"operations\[0\] has 'call', which is none of module, operation, calls"),
        (("remarks",), "none", "remarks must be a list, but is a str 'none'"),
        (("fake",), 0, "fake must be of type bool, but is an int 0"),
        (("unknown",), True, "unknown must be of type int, but is a bool True"),
    ],
)
def test_damaged_report_is_refused_by_field(path, value, match):
    data = cheapgrad.scan(nn.Linear(4, 4), torch.randn(2, 4)).to_dict()
    with pytest.raises(RecordError, match=match):
        CostReport.from_dict(replaced(data, path, value))
    assert CostReport.from_dict({**data, "label": "beside it"}).to_dict() == data


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({}, "the CostReport lacks 'rows'"),
        ("x", "a cheapgrad.scan is read from the dictionary that to_dict returned, but got a str 'x'"),
        (None, "but got a NoneType"),
    ],
)
def test_data_that_are_no_report_are_refused(data, match):
    with pytest.raises(RecordError, match=match):
        CostReport.from_dict(data)


def test_damaged_comparison_is_refused_by_field():
    report = cheapgrad.scan(nn.Linear(4, 4), torch.randn(2, 4))
    data = compare(report, report).to_dict()
    with pytest.raises(RecordError, match=r"rows\[0\]\.after\.saved_bytes must be at least 0, but is -7"):
        CostComparison.from_dict(replaced(data, ("rows", 0, "after", "saved_bytes"), -7))
    with pytest.raises(RecordError, match=r"of kind 'cheapgrad.scan', not 'cheapgrad.comparison'"):
        CostComparison.from_dict(report.to_dict())
