"""Max-pooling from offsets: outputs and gradients bit for bit, a byte per output."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, vmap

from cheapgrad import Rule, approximate
from cheapgrad.cost import measure_held_bytes
from cheapgrad.errors import ForwardModeError, NoEffectWarning, SecondDerivativeError
from cheapgrad.ops.pooling import MaxPooling, sketched_max_pooling
from cheapgrad.sketch import RowSample, StochasticRounding

RULE = Rule(stored=StochasticRounding(4))
MODULES = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
SHAPES = {1: (2, 3, 11), 2: (2, 3, 9, 7), 3: (2, 2, 5, 6, 7)}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def inputs(shape, dtype=torch.float32):
    """Return values with many ties, and with everything that is not a number."""
    x = (torch.randn(shape) * 2).round().to(dtype) / 2
    x.view(-1)[[5, 40, 41, 42]] = torch.tensor([torch.nan, -torch.inf, torch.inf, -0.0], dtype=dtype)
    return x


def run(module, x, cotangent=None):
    leaf = x.clone().requires_grad_()
    output = module(leaf)
    if cotangent is None:
        cotangent = torch.randn(output.shape, dtype=torch.float64).to(output.dtype)
    return output.detach(), torch.autograd.grad(output, leaf, cotangent)[0], cotangent


def assert_alike(stock, x):
    converted = copy.deepcopy(stock)
    approximate(converted, RULE)
    output, exact, cotangent = run(stock, x)
    ours, gradient, _ = run(converted, x, cotangent)
    assert torch.equal(ours.nan_to_num(99.0), output.nan_to_num(99.0))
    assert torch.equal(gradient, exact)
    assert gradient.count_nonzero()


@pytest.mark.parametrize("axes", MODULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_geometry_bit_for_bit(axes, dtype):
    tried = 0
    for kernel, stride, padding, dilation, ceil_mode in itertools.product(
        (2, 3), (None, 1, 2, 3), (0, 1), (1, 2), (False, True)
    ):
        stock = MODULES[axes](kernel, stride, padding, dilation, ceil_mode=ceil_mode)
        assert_alike(stock, inputs(SHAPES[axes], dtype))
        tried += 1
    assert tried == 64


@pytest.mark.parametrize(
    ("stock", "shape"),
    [
        (nn.MaxPool2d((2, 5), (1, 3), (0, 2), (2, 1)), (2, 3, 9, 8)),
        (nn.MaxPool3d((1, 2, 3), (2, 1, 1), (0, 1, 1)), (2, 2, 4, 5, 6)),
        (nn.MaxPool2d((20, 20), 1), (1, 2, 24, 24)),
        (nn.MaxPool2d(3), (3, 9, 9)),
        (nn.MaxPool1d(3), (3, 48)),
        (nn.MaxPool2d((1, 4), 1, (0, 2)), (2, 30, 2)),
    ],
    ids=repr,
)
def test_windows_of_all_kinds(stock, shape):
    assert_alike(stock, inputs(shape))


def test_an_offset_of_another_place_is_caught(monkeypatch):
    backward = MaxPooling.backward
    monkeypatch.setattr(
        MaxPooling, "backward", lambda self, grad, offset, shape: backward(self, grad, (offset + 1) % 4, shape)
    )
    with pytest.raises(AssertionError):
        assert_alike(nn.MaxPool2d(2), inputs((2, 3, 8, 8)))


def test_strided_inputs():
    assert_alike(nn.MaxPool2d(3, 2), inputs((2, 3, 9, 9)).contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize(
    ("stock", "shape", "offset_bytes"),
    [
        (nn.MaxPool1d(2), (2, 3, 12), 1),
        (nn.MaxPool2d(3, 2, 1), (2, 3, 9, 9), 1),
        (nn.MaxPool2d(16, 16), (2, 3, 32, 32), 1),
        (nn.MaxPool2d(17, 17), (2, 3, 34, 34), 2),
        (nn.MaxPool3d(2), (2, 3, 4, 6, 6), 1),
    ],
    ids=repr,
)
def test_bytes_held_are_those_predicted(stock, shape, offset_bytes):
    converted = copy.deepcopy(stock)
    handle = approximate(converted, RULE)
    x = torch.randn(shape, requires_grad=True)
    exact, ours = (measure_held_bytes(lambda model=model: model(x)).total_bytes for model in (stock, converted))
    (row,) = handle.rows
    assert (row.exact_saved_bytes, row.saved_bytes) == (exact, ours)
    assert ours == stock(x).numel() * offset_bytes


def test_mapped_gradients():
    pooling, x = MaxPooling((2, 2), (2, 2), (0, 0), (1, 1)), torch.randn(5, 2, 3, 4, 4)
    ours = vmap(grad(lambda image: sketched_max_pooling(image, pooling).square().sum()))(x)
    stock = vmap(grad(lambda image: nn.functional.max_pool2d(image, 2).square().sum()))(x)
    assert torch.equal(ours, stock)


def test_what_is_refused():
    handle = approximate(nn.Sequential(nn.Linear(64, 64), nn.MaxPool2d(2, return_indices=True)), RULE, skip_small=False)
    assert "return_indices=True" in handle.rows[1].remark
    with pytest.warns(NoEffectWarning, match="RowSample has no meaning for MaxPool2d"):
        approximate(nn.Sequential(nn.MaxPool2d(2)), Rule(stored=RowSample(0.5)))
    model, x = nn.MaxPool2d(2), torch.randn(1, 2, 4, 4, requires_grad=True)
    approximate(model, RULE)
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(SecondDerivativeError, match="through a sketched max-pooling"):
        first.sum().backward()
    with forward_ad.dual_level(), pytest.raises(ForwardModeError, match="asked of a sketched max-pooling"):
        model(forward_ad.make_dual(x, torch.ones_like(x)))
    with torch.no_grad():
        assert torch.equal(model(x), nn.functional.max_pool2d(x, 2))
