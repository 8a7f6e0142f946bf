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
from torch.utils._python_dispatch import TorchDispatchMode

from cheapgrad import Rule, approximate
from cheapgrad.cost import measure_held_bytes
from cheapgrad.errors import NoEffectWarning
from cheapgrad.ops.fixed_maps import FixedMap, sketched_fixed_map
from cheapgrad.sketch import RowSample, StochasticRounding
from tests.devices import DEVICES
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
    rolled = lambda self, grad, layout: backward(self, grad, layout).roll(1, -1)  # noqa: E731 - one line each
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


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()]),
    "channels innermost": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "transposed": lambda x: x.transpose(-1, -2),
    "every other channel": lambda x: torch.stack([x, x], 2).flatten(1, 2)[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("stock", "axes"),
    [
        *((pooling(2), axes) for axes, pooling in POOLINGS.items()),
        *((pooling(4), axes) for axes, pooling in ADAPTIVE.items()),
        *((paddings[axes](1), axes) for paddings in PADDINGS.values() for axes in SIZES),
    ],
    ids=str,
)
def test_gradients_have_the_memory_format_that_pytorch_gives_them(stock, axes, layout):
    if axes == 1 and layout == "channels last":
        pytest.skip("a format of images")
    x = LAYOUTS[layout](inputs(axes))
    ours, _ = converted(stock)
    strides = []
    for module in (stock, ours):
        leaf = x.detach().requires_grad_()
        output = module(leaf)
        strides.append((output.stride(), torch.autograd.grad(output.sum(), leaf)[0].stride()))
    assert strides[0] == strides[1]


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in before:
            self.total += result.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize("stock", [nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(3), nn.ReplicationPad2d(1)], ids=str)
def test_backward_allocates_the_gradient_and_one_number(stock):
    ours, _ = converted(stock)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    output = ours(x)
    with AllocatedBytes() as allocated:
        torch.autograd.grad(output, x, torch.ones_like(output))
    assert allocated.total == 4 * (output.numel() + x.numel() + 1)


class OnAnotherDevice(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = property(lambda self: True)


@pytest.fixture
def deterministic():
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(False)


def outcome(module, x, deterministic, when):
    """Return the gradient of an input under deterministic algorithms, or what is said instead."""
    deterministic(when == "throughout")
    leaf = x.detach().clone().requires_grad_()
    try:
        output = module(leaf)
        deterministic(True)
        return torch.autograd.grad(output.square().sum(), leaf)[0]
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("when", ["throughout", "backward"])
@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("axes", SIZES)
def test_deterministic_algorithms_are_those_of_pytorch(kind, axes, when, device, deterministic):
    stock = PADDINGS[kind][axes](2)
    ours, _ = converted(stock)
    x = inputs(axes).to(device)
    exact, own = (outcome(module, x, deterministic, when) for module in (stock, ours))
    assert type(exact) is type(own)
    assert exact == own if isinstance(exact, str) else torch.equal(exact, own)
    assert device != "cpu" or isinstance(own, torch.Tensor)


def nodes_of(output):
    """Return the names of all nodes of a graph that is a line, nearest first."""
    names, node = [], output.grad_fn
    while node is not None:
        names.append(node.name())
        node = next((before for before, _ in node.next_functions), None)
    return names


@pytest.mark.parametrize("axes", SIZES)
def test_replication_is_pytorchs_own_where_that_indexes(axes, deterministic):
    stock = nn.Sequential(PADDINGS["replication"][axes](2))
    made = []
    for wanted in (False, True):
        deterministic(wanted)
        ours, handle = converted(stock)
        x = inputs(axes).requires_grad_().as_subclass(OnAnotherDevice)
        made.append([nodes_of(module(x)) for module in (stock, ours)])
    (stock_kernel, own_kernel), (stock_indexing, own_indexing) = made
    kernels = dict.fromkeys((f"ReplicationPad{axes}DBackward0", "_EagerSizesOnlyBackward"))
    assert [kernels.keys() & names for names in (stock_kernel, own_kernel)] == [{name} for name in kernels]
    assert stock_indexing == own_indexing
    assert not kernels.keys() & own_indexing
    (row,) = handle.rows
    assert (row.exact_saved_bytes, row.saved_bytes) == (0, 0)


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
