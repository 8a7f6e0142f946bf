"""Every entry of the table but those on two processes, which `test_distributed` runs."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from cheapgrad.sketch import fusing
from cheapgrad.sketch._compiling import find_obstacle
from tests.contexts.checks import check_draws
from tests.contexts.runners import RUNNERS, converted_model, problem
from tests.contexts.table import CONTEXTS, ROWS
from tests.convert.models import Conv1D
from tests.devices import DEVICES

DRAWS = 64
ENTRIES = [
    pytest.param(
        context,
        row,
        id=f"{context.key}-{row.name}",
        marks=[pytest.mark.slow] if context.key == "inductor" else [],
    )
    for context in CONTEXTS
    if context.key in RUNNERS
    for row in ROWS
    if context.covers(row)
]


# With something else than a layer to run; of a function there is no other forward to compare with.
_NOT_ALONE = [
    row
    for row in ROWS
    if not row.layer.is_one_layer and row.layer.stock is None and "autocast" not in dict(row.layer.lacks)
]


@pytest.fixture(autouse=True)
def _importable_stand_in(monkeypatch):
    """Let pickle find the stand-in for the transformers library's class."""
    package, library = types.ModuleType("transformers"), types.ModuleType("transformers.pytorch_utils")
    library.Conv1D = Conv1D
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, library.__name__, library)


# Compiled already, or watched by a transform: codecs are then not compiled by themselves.
_UNFUSED = ("aot_eager", "inductor", "vmap")


@pytest.fixture
def fused_calls(monkeypatch):
    """Count what runs fused, and let no codec be too small for it."""
    calls, run = [], fusing._run_compiled

    def count(function, *arguments):
        calls.append(function.__name__)
        return run(function, *arguments)

    monkeypatch.setattr(fusing, "_run_compiled", count)
    monkeypatch.setattr(fusing, "_LEAST", 0)
    yield calls
    assert fusing.why_unfused() == ""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("context", "row"), ENTRIES)
def test_entry(context, row, device, fused_calls):
    if row.is_fused and find_obstacle(device):
        pytest.skip(f"not run: {find_obstacle(device)}")
    draw = RUNNERS[context.key](row, device)
    torch.manual_seed(1)
    check_draws(row, draw(DRAWS), tolerance=2e-2 if context.key == "autocast" else 1e-4)
    assert bool(fused_calls) == (row.is_fused and context.key not in _UNFUSED)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row", [row for row in ROWS if row.layer.is_one_layer], ids=lambda row: row.name)
def test_under_autocast_low_precision_is_kept_and_forward_is_stock(row, device):
    model, (x, _) = converted_model(row, device), problem(row, device)
    held = []
    with (
        torch.autocast(device, torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor),
    ):
        output = model(x)
    with torch.autocast(device, torch.bfloat16), torch.no_grad():
        expected = model(x)
    assert torch.equal(output, expected)
    floating = [tensor for tensor in held if tensor.is_floating_point()]
    assert floating
    # A random map of normal numbers stays in single precision; what it was applied to does not.
    maps = 1 if "Gaussian" in row.name else 0
    assert sum(tensor.dtype != torch.bfloat16 for tensor in floating) == maps


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row", _NOT_ALONE, ids=lambda row: row.name)
def test_under_autocast_forward_is_stock(row, device):
    outputs = []
    for model in (row.layer.model().to(device), converted_model(row, device)):
        torch.manual_seed(1)
        with torch.autocast(device, torch.bfloat16):
            outputs.append(model(problem(row, device)[0]))
    assert torch.equal(*outputs)
