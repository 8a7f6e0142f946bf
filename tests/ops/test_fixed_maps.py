"""Average pooling and padding: outputs and gradients bit for bit and against a dense matrix, holding nothing."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from cheapgrad import Rule, approximate
from cheapgrad.cost import measure_held_bytes
from cheapgrad.errors import NoEffectWarning
from cheapgrad.ops.fixed_maps import FixedMap, sketched_fixed_map
from cheapgrad.sketch import RowSample, StochasticRounding
from tests.oracles import averages

RULE = Rule(stored=StochasticRounding(4))
POOLINGS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
ADAPTIVE = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
PADDINGS = {
    "reflection": {1: nn.ReflectionPad1d, 2: nn.ReflectionPad2d, 3: nn.ReflectionPad3d},
    "replication": {1: nn.ReplicationPad1d, 2: nn.ReplicationPad2d, 3: nn.ReplicationPad3d},
}
SIZES = {1: (11,), 2: (9, 7), 3: (5, 6, 7)}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def has_kernel(stock, dtype):
    """Tell whether PyTorch itself has this map in this dtype."""
    axes = 1 + [name in type(stock).__name__ for name in ("1d", "2d", "3d")].index(True)
    try:
        stock(torch.ones(1, 1, *SIZES[axes], dtype=dtype))
    except (NotImplementedError, RuntimeError):
        return False
    return True


def converted(stock):
    ours = copy.deepcopy(stock)
    handle = approximate(ours, RULE)
    return ours, handle


def run(module, x, cotangent=None):
    leaf = x.clone().requires_grad_()
    output = module(leaf)
    if cotangent is None:
        cotangent = torch.randn(output.shape, dtype=torch.float64).to(output.dtype)
    return output.detach(), torch.autograd.grad(output, leaf, cotangent)[0], cotangent


def assert_alike(stock, x):
    ours, _ = converted(stock)
    output, exact, cotangent = run(stock, x)
    own, gradient, _ = run(ours, x, cotangent)
    torch.testing.assert_close(own, output, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(gradient, exact, rtol=0, atol=0, equal_nan=True)
    assert gradient.count_nonzero()


def assert_is_matrix(stock, x, matrix):
    """Check both directions against the matrix that the definition gives."""
    sizes = x.shape[2:]
    ours, _ = converted(stock)
    output, gradient, cotangent = run(ours, x)
    flat = (tensor.flatten(2).flatten(0, 1).numpy() for tensor in (x, output, cotangent, gradient))
    x_NI, output_NO, cotangent_NO, gradient_NI = flat
    assert matrix.shape == (output_NO.shape[1], np.prod(sizes))
    np.testing.assert_allclose(output_NO, x_NI @ matrix.T, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(gradient_NI, cotangent_NO @ matrix, rtol=1e-12, atol=1e-13)


def inputs(axes, dtype=torch.float64, lead=(2, 3)):
    return torch.randn(*lead, *SIZES[axes], dtype=torch.float64).to(dtype)


def pooling_of(axes, kernel, stride, padding, ceil_mode, count_include_pad, divisor):
    options = {"ceil_mode": ceil_mode, "count_include_pad": count_include_pad}
    if axes > 1:
        options["divisor_override"] = divisor
    return POOLINGS[axes](kernel, stride, padding, **options)


GEOMETRIES = list(itertools.product((2, 3), (None, 1, 2, 3), (0, 1), (False, True), (False, True), (None, 3)))


@pytest.mark.parametrize("axes", POOLINGS)
def test_every_geometry_is_the_matrix_of_its_definition(axes):
    tried = 0
    for kernel, stride, padding, ceil_mode, count_include_pad, divisor in GEOMETRIES:
        divisor = divisor if axes > 1 else None
        stock = pooling_of(axes, kernel, stride, padding, ceil_mode, count_include_pad, divisor)
        each = [(option,) * axes for option in (kernel, stride or kernel, padding)]
        matrix = averages.average_pooling(SIZES[axes], *each, ceil_mode, count_include_pad, divisor)
        assert_is_matrix(stock, inputs(axes), matrix)
        tried += 1
    assert tried == 128


@pytest.mark.parametrize("axes", POOLINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_geometry_bit_for_bit(axes, dtype):
    for geometry in GEOMETRIES:
        stock = pooling_of(axes, *geometry)
        if has_kernel(stock, dtype):
            assert_alike(stock, inputs(axes, dtype))
        else:
            assert (axes, dtype) == (3, torch.bfloat16)


@pytest.mark.parametrize("axes", ADAPTIVE)
@pytest.mark.parametrize("outputs", [1, 2, 4, 5, 8])
def test_adaptive_pooling(axes, outputs):
    matrix = averages.adaptive_pooling(SIZES[axes], (outputs,) * axes)
    assert_is_matrix(ADAPTIVE[axes](outputs), inputs(axes), matrix)
    for dtype in DTYPES:
        assert_alike(ADAPTIVE[axes](outputs), inputs(axes, dtype))


def test_which_kernels_pytorch_lacks():
    stocks = [nn.AvgPool3d(2), nn.AdaptiveAvgPool3d(2), nn.ReflectionPad2d(1), nn.ReplicationPad2d(1)]
    lacking = [type(stock).__name__ for stock in stocks if not has_kernel(stock, torch.bfloat16)]
    assert lacking == ["AvgPool3d"]


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("axes", SIZES)
def test_padding(kind, axes):
    for amount in (1, (0, 2) * axes, tuple(range(1, 2 * axes + 1)) if axes < 3 else (3, 1, 0, 2, 4, 1)):
        stock = PADDINGS[kind][axes](amount)
        # PyTorch's pairs begin with the last axis.
        pairs = list(zip(stock.padding[::2], stock.padding[1::2], strict=True))[::-1]
        matrix = averages.padding(SIZES[axes], *zip(*pairs, strict=True), kind)
        assert_is_matrix(stock, inputs(axes), matrix)
        for dtype in DTYPES:
            assert_alike(stock, inputs(axes, dtype))


@pytest.mark.parametrize(
    ("stock", "x"),
    [
        (nn.AvgPool2d((2, 5), (1, 3), (0, 2)), inputs(2)),
        (nn.AvgPool3d((1, 2, 3), (2, 1, 1), (0, 1, 1), ceil_mode=True), inputs(3)),
        (nn.AvgPool1d(3), inputs(1, lead=(3,))),
        (nn.AvgPool2d(3), inputs(2, lead=(3,))),
        (nn.AdaptiveAvgPool2d((None, 3)), inputs(2)),
        (nn.AdaptiveAvgPool2d((3, None)), inputs(2, lead=(4,))),
        (nn.AdaptiveAvgPool3d((2, None, 1)), inputs(3)),
        (nn.AvgPool2d(3, 2), inputs(2).contiguous(memory_format=torch.channels_last)),
        (nn.AdaptiveAvgPool2d(4), inputs(2).contiguous(memory_format=torch.channels_last)),
        (nn.ReflectionPad2d(2), inputs(2, lead=(3,))),
        (nn.AvgPool2d(2), inputs(2).transpose(2, 3)),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else "",
)
def test_other_inputs_bit_for_bit(stock, x):
    assert_alike(stock, x)
    x[..., 0, :1] = torch.nan
    assert_alike(stock, x)


def test_sizes_of_another_input_are_caught(monkeypatch):
    backward = FixedMap.backward
    rolled = lambda self, grad, shape: backward(self, grad, shape).roll(1, -1)  # noqa: E731 - one line each
    monkeypatch.setattr(FixedMap, "backward", rolled)
    with pytest.raises(AssertionError):
        assert_alike(nn.AvgPool2d(2), inputs(2))


@pytest.mark.parametrize(
    ("stock", "axes", "held"),
    [
        (nn.AvgPool1d(2), 1, "input"),
        (nn.AvgPool2d(3, 2, 1, ceil_mode=True), 2, "input"),
        (nn.AvgPool3d(2), 3, "input"),
        (nn.AdaptiveAvgPool1d(4), 1, "input"),
        (nn.AdaptiveAvgPool1d(1), 1, "nothing"),
        (nn.AdaptiveAvgPool2d((None, 2)), 2, "input"),
        (nn.AdaptiveAvgPool2d(1), 2, "nothing"),
        (nn.AdaptiveAvgPool3d(1), 3, "nothing"),
        (nn.AdaptiveAvgPool3d(2), 3, "input"),
        (nn.ReflectionPad1d(2), 1, "input"),
        (nn.ReplicationPad3d(2), 3, "input"),
    ],
    ids=str,
)
@pytest.mark.parametrize("wants_input", [True, False])
def test_bytes_held_are_those_predicted(stock, axes, held, wants_input):
    ours, handle = converted(stock)
    x = inputs(axes, torch.float32).requires_grad_(wants_input)
    exact, own = (measure_held_bytes(lambda model=model: model(x)).total_bytes for model in (stock, ours))
    (row,) = handle.rows
    assert (row.exact_saved_bytes, row.saved_bytes) == (exact, own)
    assert own == 0
    assert exact == (4 * x.numel() if held == "input" and wants_input else 0)


def test_a_block_of_convolution_average_and_relu_holds_its_input_and_bits_only():
    block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.AvgPool2d(2), nn.ReLU())
    approximate(block, Rule("[12]", stored=StochasticRounding(4)))
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    assert measure_held_bytes(lambda: block(x), exclude=[block, x]).total_bytes == 4 * 8 * 8 * 8 // 8


def test_second_derivatives_and_forward_mode_are_exact():
    x, tangent = inputs(2), inputs(2)
    for stock in (nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(4), nn.ReflectionPad2d(2)):
        ours, _ = converted(stock)
        hessians = []
        for module in (stock, ours):
            leaf = x.clone().requires_grad_()
            (first,) = torch.autograd.grad(module(leaf).pow(3).sum(), leaf, create_graph=True)
            hessians.append(torch.autograd.grad(first.square().sum(), leaf)[0])
        assert torch.equal(*hessians)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(ours(forward_ad.make_dual(x, tangent)))
            assert torch.equal(dual.tangent, stock(tangent))
        values, slopes = jvp(ours, (x.clone().requires_grad_(),), (tangent,))
        assert torch.equal(values, stock(x))
        assert torch.equal(slopes, stock(tangent))


def test_mapped_gradients():
    fixed_map = FixedMap("average pooling over 2 axes", ((2, 2), (2, 2), (0, 0), False, True, None))
    x = torch.randn(5, 2, 3, 4, 4)
    ours = vmap(grad(lambda image: sketched_fixed_map(image, fixed_map).square().sum()))(x)
    stock = vmap(grad(lambda image: nn.functional.avg_pool2d(image, 2).square().sum()))(x)
    torch.testing.assert_close(ours, stock)


def test_what_means_nothing_is_said():
    with pytest.warns(NoEffectWarning, match="RowSample has no meaning for AvgPool2d"):
        approximate(nn.Sequential(nn.AvgPool2d(2)), Rule(stored=RowSample(0.5)))
    ours, handle = converted(nn.AvgPool2d(2))
    x = inputs(2)
    with torch.no_grad():
        assert torch.equal(ours(x), nn.functional.avg_pool2d(x, 2))
    with handle.exact():
        assert "AvgPool2D" in type(ours(x.requires_grad_()).grad_fn).__name__
    with pytest.raises(IndexError, match="Dimension out of range"):
        ours(torch.randn(3, 3, requires_grad=True))
