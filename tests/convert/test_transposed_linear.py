"""The GPT-2 style projection, recognised by name and module without importing the library."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cheapgrad import approximate
from tests.convert.models import Conv1D, convert, gradients, same
from tests.placements import PLACEMENTS


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda placement: placement.name)
def test_forward_is_bit_identical(placement, dtype):
    layer = Conv1D(48, 32).to(dtype)
    stock = copy.deepcopy(layer)
    approximate(layer, placement.rule(), skip_small=False)
    assert type(layer).__name__ == "SketchedConv1D"
    for shape in ((7, 32), (3, 5, 32), (0, 32), (2, 3, 4, 32)):
        x = torch.randn(shape, dtype=dtype)
        assert torch.equal(layer(x), stock(x))
        assert [one.shape for one in gradients(layer, x)] == [one.shape for one in gradients(stock, x)]


def test_forward_is_bit_identical_at_widths_that_kernels_treat_apart():
    for inputs, outputs in ((1, 1), (3, 5), (64, 192), (257, 129)):
        layer = Conv1D(outputs, inputs)
        stock = copy.deepcopy(layer)
        convert(layer)
        for rows in (1, 2, 31, 64):
            x = torch.randn(rows, inputs)
            assert torch.equal(layer(x), stock(x)), (inputs, outputs, rows)


@pytest.mark.parametrize("placement", PLACEMENTS[::4], ids=lambda placement: placement.name)
def test_gradient_is_unbiased(placement):
    layer = Conv1D(32, 32)
    x = torch.randn(2, 16, 32)
    exact = gradients(layer, x)
    handle = approximate(layer, placement.rule(), skip_small=False)
    draws = [gradients(layer, x, seed) for seed in range(600)]
    for position, truth in enumerate(exact):
        along = torch.stack([(draw[position] * truth).sum() for draw in draws]) / truth.square().sum()
        error = along.std() / 600**0.5
        assert error < 0.02
        assert abs(along.mean() - 1) < 5 * error + 1e-5
    with handle.exact():
        assert same(gradients(layer, x), exact)
    handle.revert()
    assert type(layer) is Conv1D


def test_predictions_and_names():
    model = nn.Sequential(Conv1D(32, 64))
    handle = convert(model)
    x = torch.randn(4, 5, 64)
    (row,) = handle.predict(lambda: model[0](x=x).square().sum())
    assert (row.name, row.kind) == ("0", "Conv1D")
    assert row.exact_saved_bytes == 4 * 5 * 64 * 4
    assert row.exact_backward_flops == 4 * 20 * 64 * 32
    assert row.relative_variance > 0


def test_a_namesake_from_elsewhere_is_left_alone():
    namesake = type("Conv1D", (nn.Module,), {"__module__": "elsewhere"})()
    namesake.weight = nn.Parameter(torch.randn(4, 4))
    handle = convert(nn.Sequential(namesake, nn.Linear(4, 4)))
    assert handle.rows[0].remark == "unsupported: no sketched operation for Conv1D"
