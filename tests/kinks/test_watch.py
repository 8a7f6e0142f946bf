"""A watch counts the kinks and ties that layers meet, and leaves nothing behind."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint

from cheapgrad.errors import ModelTypeError
from cheapgrad.kinks import KinkReport, watch

# Each is a call, and of all places where it could meet a kink how many there are and how many do.
CALLS = {
    "relu": (lambda x: x.relu(), [0.0, -0.0, 1.0], 3, 2),
    "relu_": (lambda x: (x * 1).relu_(), [0.0, -0.0, 1.0], 3, 2),
    "abs": (torch.abs, [0.0, 1.0], 2, 1),
    "sign": (torch.sign, [0.0, 1.0], 2, 1),
    "hardtanh": (functional.hardtanh, [-1.0, 1.0, 0.5, 0.0], 4, 2),
    "relu6": (functional.relu6, [0.0, 6.0, 0.5], 3, 2),
    "leaky_relu": (functional.leaky_relu, [0.0, 1.0], 2, 1),
    "leaky_relu, linear": (lambda x: functional.leaky_relu(x, 1.0), [0.0, 1.0], 0, 0),
    "prelu": (lambda x: functional.prelu(x, torch.ones(1)), [0.0, 1.0], 2, 1),
    "rrelu": (functional.rrelu, [0.0, 1.0], 2, 1),
    "hardswish": (functional.hardswish, [-3.0, 3.0, 0.0], 3, 2),
    "hardsigmoid": (functional.hardsigmoid, [-3.0, 3.0, 0.0], 3, 2),
    "elu, smooth": (functional.elu, [0.0, 1.0], 0, 0),
    "elu": (lambda x: functional.elu(x, 0.5), [0.0, 1.0], 2, 1),
    "selu": (functional.selu, [0.0, 1.0], 2, 1),
    "celu, smooth": (lambda x: functional.celu(x, 0.5), [0.0, 1.0], 0, 0),
    "gelu, smooth": (functional.gelu, [0.0, 1.0], 0, 0),
    "softshrink": (functional.softshrink, [0.5, -0.5, 0.0], 3, 2),
    "hardshrink": (functional.hardshrink, [0.5, -0.5, 0.0], 3, 2),
    "threshold": (lambda x: functional.threshold(x, 1.0, 0.0), [1.0, 0.0], 2, 1),
    "clamp": (lambda x: x.clamp(-1, 1), [-1.0, 1.0, 0.0], 3, 2),
    "clamp from above": (lambda x: x.clamp(max=1), [-1.0, 1.0, 0.0], 3, 1),
    "clamp_min": (lambda x: torch.clamp_min(x, 0), [-1.0, 0.0], 2, 1),
    "clamp_max": (lambda x: torch.clamp_max(x, 0), [-1.0, 0.0], 2, 1),
    "clamp by tensors": (lambda x: torch.clamp(x, torch.tensor([0.0, 1.0])), [0.0, 0.0], 2, 1),
    "floor": (torch.floor, [1.0, 0.5], 2, 1),
    "round": (torch.round, [1.0, 0.5, -2.5], 3, 2),
    "maximum": (lambda x: torch.maximum(x, torch.ones(3)), [1.0, 0.0, 1.0], 3, 2),
    "max": (torch.max, [1.0, 1.0, 0.0], 1, 1),
    "max over an axis": (lambda x: x.max(-1), [[1.0, 1.0], [0.0, 1.0]], 2, 1),
    "amin over axes": (lambda x: x.amin((0, 1)), [[1.0, 1.0], [0.0, 1.0]], 1, 0),
    "median": (lambda x: x.median(1), [[1.0, 1.0, 2.0], [0.0, 0.0, 1.0], [0.0, 1.0, 2.0]], 3, 2),
    "kthvalue": (lambda x: x.kthvalue(2), [[1.0, 1.0, 2.0], [0.0, 1.0, 2.0]], 2, 1),
    "sort": (torch.sort, [[1.0, 2.0, 1.0], [0.0, 1.0, 2.0]], 2, 1),
    "stable sort": (lambda x: torch.sort(x, stable=True, dim=0), [[1.0, 2.0, 1.0], [1.0, 1.0, 2.0]], 3, 1),
    "topk, border": (lambda x: x.topk(1), [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]], 2, 1),
    "topk, smallest": (lambda x: x.topk(1, largest=False), [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]], 2, 1),
    "norm": (lambda x: x.norm(dim=1), [[0.0, 0.0], [0.0, 1.0]], 2, 1),
    "norm 1": (lambda x: torch.linalg.vector_norm(x, 1), [[0.0, 0.0], [0.0, 1.0]], 4, 3),
    "norm inf": (lambda x: torch.linalg.vector_norm(x, torch.inf, dim=1), [[2.0, -2.0], [0.0, 1.0]], 2, 1),
    "max_pool1d": (lambda x: functional.max_pool1d(x, 2), [[1.0, 1.0, 0.0, 1.0]], 2, 1),
    "max_pool2d": (lambda x: functional.max_pool2d(x[None], 2, 1), [[1.0, 1.0, 0.0], [0.0, 0.0, 2.0]], 2, 1),
    "max_pool3d": (lambda x: functional.max_pool3d(x[None, None], (1, 2, 2)), [[1.0, 1.0], [0.0, 0.0]], 1, 1),
    "adaptive": (lambda x: functional.adaptive_max_pool2d(x[None], 1), [[1.0, 1.0], [0.0, 0.0]], 1, 1),
    "l1_loss": (lambda x: functional.l1_loss(x, torch.ones(2)), [1.0, 0.0], 2, 1),
    "hinge": (lambda x: functional.hinge_embedding_loss(x, -torch.ones(2)), [1.0, 0.0], 2, 1),
    "numbers, not floats": (lambda x: x.long().clamp(min=0), [0.0, 1.0], 0, 0),
    "nothing to look at": (lambda x: x[:0].relu(), [0.0], 0, 0),
}


class _Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_kinks_of_each_operation_are_counted(name, needs_gradient):
    function, values, places, kinks = CALLS[name]
    model = _Call(function)
    x = torch.tensor(values, requires_grad=needs_gradient)
    with watch(model) as counts, torch.set_grad_enabled(needs_gradient):
        model(x)
    rows = counts.report().rows
    assert sum(row.places for row in rows) == places
    assert sum(row.kinks for row in rows) == kinks
    assert {row.layer for row in rows} <= {""}
    assert counts.report().not_counted == ()


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2))
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(18, 4)

    def forward(self, x):
        return self.head(self.act(self.stem(x).flatten(1))).abs()


def _black_and_noise():
    images = torch.randn(2, 1, 8, 8)
    images[0] = 0.0
    return images


def test_layers_have_their_own_rows_and_the_loss_is_outside():
    model, images = _Net(), _black_and_noise()
    with watch(model) as counts:
        functional.l1_loss(model(images), torch.zeros(2, 4)).backward()
    report = counts.report()
    found = {(row.layer, row.operation): (row.calls, row.places, row.kinks) for row in report.rows}
    # The black picture: 2 channels of 6 x 6, pooled to 3 x 3. What noise sends to zero by chance ties the windows too.
    assert found["stem.1", "relu"] == (1, 2 * 2 * 36, 72)
    pooled = found["stem.2", "max_pool2d_with_indices"]
    assert pooled[:2] == (1, 2 * 2 * 9)
    assert pooled[2] >= 18
    assert found["act", "relu"][:2] == (1, 2 * 18)
    assert found["", "abs"] == (1, 8, 0)
    assert found["(outside)", "abs"] == (1, 8, 0)
    rows = {row.layer: row for row in report.rows}
    assert rows["stem.2"].zero_kinks == rows["stem.2"].kinks
    assert rows["stem.1"].share == 0.5


def test_counts_add_up_over_steps_and_dtypes():
    model = nn.Sequential(nn.ReLU())
    with watch(model) as counts:
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            model(torch.zeros(5, dtype=dtype))
    rows = [(row.dtype, row.calls, row.places, row.kinks) for row in counts.report().rows]
    assert rows == [("float32", 2, 10, 10), ("bfloat16", 1, 5, 5)]
    assert counts.report().kinks == 15


def test_autocast_is_counted_in_the_dtype_it_ran_in():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    with watch(model) as counts, torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(2, 4))
    assert [row.dtype for row in counts.report().rows] == ["bfloat16"]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_is_not_counted_twice(use_reentrant):
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with watch(block) as counts:
        x = torch.zeros(2, 4, requires_grad=True)
        checkpoint(block, x, use_reentrant=use_reentrant).sum().backward()
    assert [(row.layer, row.calls) for row in counts.report().rows] == [("1", 1)]


def test_shared_module_is_one_row_and_the_optimizer_is_none():
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 3), act, nn.Linear(3, 3), act)
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True, foreach=False)
    with watch(model) as counts:
        model(torch.randn(2, 3)).sum().backward()
        optimizer.step()
    assert [(row.layer, row.operation, row.calls) for row in counts.report().rows] == [("1", "relu", 2)]


def test_watching_changes_neither_values_nor_gradients():
    model, images = _Net(), _black_and_noise()

    def step():
        output = model(images)
        return [output, *torch.autograd.grad(output.sum(), list(model.parameters()))]

    plain = step()
    with watch(model):
        watched = step()
    assert all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_model_is_seen_too(fullgraph):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    with watch(model) as counts:
        compiled(torch.randn(2, 3)).sum().backward()
    assert [(row.layer, row.operation, row.calls) for row in counts.report().rows] == [("1", "relu", 1)]


@pytest.mark.parametrize("name", CALLS)
def test_inference_mode_hides_nothing(name):
    function, values, places, kinks = CALLS[name]
    model = _Call(function)
    with torch.inference_mode(), watch(model) as counts:
        model(torch.tensor(values))
    rows = counts.report().rows
    assert (sum(row.places for row in rows), sum(row.kinks for row in rows)) == (places, kinks)


def _bag(mode):
    return lambda x: functional.embedding_bag(torch.tensor([[0, 1]]), x[:, None], mode=mode)


UNKNOWN = {
    "cummax": lambda x: x.cummax(0),
    "remainder": lambda x: torch.remainder(x, 2.0),
    "dist": lambda x: torch.dist(x, x),
    "hypot": lambda x: torch.hypot(x, x),
    "_linalg_svd": lambda x: torch.linalg.matrix_norm(x.view(2, 2), "nuc"),
    "std": torch.std,
    "_foreach_abs": lambda x: torch._foreach_abs([x]),
    "div": lambda x: torch.div(x, 2.0, rounding_mode="floor"),
    "_embedding_bag_forward_only": _bag("max"),
    "flex_attention": lambda x: flex_attention(*[x.view(1, 1, 4, 1)] * 3),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("operation", UNKNOWN)
def test_what_no_counter_knows_is_named(operation):
    model = nn.Sequential(nn.Identity(), _Call(UNKNOWN[operation]))
    with watch(model) as counts, torch.no_grad():
        model(torch.randn(4))
    assert counts.report().not_counted == (f"1: {operation}",)
    assert str(counts.report()).endswith(f"not counted: 1: {operation}")


@pytest.mark.parametrize("smooth", [_bag("sum"), lambda x: torch.div(x, 2.0)])
def test_smooth_calls_of_the_same_operations_are_not_named(smooth):
    model = _Call(smooth)
    with watch(model) as counts:
        model(torch.randn(4))
    assert counts.report().not_counted == ()


class _Picky(nn.Module):
    def forward(self, x):
        raise ValueError("not today")


class _Forgiving(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(_Picky())
        self.second = nn.ReLU()

    def forward(self, x):
        try:
            return self.first(x)
        except ValueError:
            return x.abs() + self.second(x)


def test_exception_caught_inside_the_model_leaves_the_names_right():
    model = _Forgiving()
    with watch(model) as counts:
        model(torch.zeros(2))
    assert [(row.layer, row.operation) for row in counts.report().rows] == [("", "abs"), ("second", "relu")]


def test_hooks_and_modes_are_gone_also_after_an_exception():
    model = nn.Sequential(nn.ReLU(), _Picky())
    with pytest.raises(ValueError, match="not today"), watch(model) as counts:
        model(torch.zeros(2))
    assert counts.report().kinks == 2
    assert _get_current_dispatch_mode() is None
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    model[0](torch.zeros(2))
    assert counts.report().kinks == 2


def test_report_is_json_and_comes_back():
    with watch(nn.ReLU()) as counts:
        torch.relu(torch.zeros(3, requires_grad=True))
    report = counts.report()
    assert KinkReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert "(outside)  relu       float32      1       3      3           3  1.00e+00" in str(report)


def test_windows_of_nan_are_no_ties():
    image = torch.full((1, 1, 4, 4), float("nan"), requires_grad=True)
    with torch.no_grad():
        image[..., :2, :2] = 1.0
    with watch(nn.MaxPool2d(2)) as counts:
        functional.max_pool2d(image, 2).amax()
    pooled, largest = counts.report().rows
    assert (pooled.kinks, pooled.places, largest.kinks) == (1, 4, 0)


def test_what_is_no_module_is_refused():
    with pytest.raises(ModelTypeError, match="got function"), watch(lambda x: x):
        pass
