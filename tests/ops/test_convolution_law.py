"""Laws of sketched convolutions: bias, variance and cost as predicted; biased and mis-scaled twins are caught."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from cheapgrad.ops import _convolution_products
from cheapgrad.ops.convolution import ConvolutionConfig, sketched_convolution
from cheapgrad.ops.convolution_law import (
    ConvolutionShape,
    convolution_flops,
    convolution_saved_bytes,
    convolution_variance,
)
from cheapgrad.ops.plan import Plan
from cheapgrad.sketch import (
    ColumnNorm,
    ColumnSample,
    CountSketch,
    ElementMask,
    ExampleSample,
    FeatureSample,
    Hadamard,
    JointNorm,
    LowRank,
    Moment,
    Pivotal,
    Poisson,
    PredictedNorm,
    ProductNorm,
    RowProjection,
    RowSample,
    Selection,
    StochasticRounding,
    StoredNorm,
    Uniform,
    WinnerTakeAll,
    WithReplacement,
)
from tests.ops.convolution_cases import (
    Layer,
    assert_unbiased,
    assert_variance,
    build,
    draw_gradients,
    draws_needed,
    plan_of,
    run,
)

LAYERS = {
    "2d-grouped": (lambda: nn.Conv2d(4, 8, 3, 2, 1, (1, 2), groups=2), (5, 4, 6, 7)),
    "2d-reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (4, 3, 4, 3)),
    "2d-transposed": (lambda: nn.ConvTranspose2d(4, 8, (3, 2), 2, 1, 1, groups=2), (5, 4, 4, 3)),
    "1d-same": (lambda: nn.Conv1d(3, 6, 4, padding="same"), (6, 3, 9)),
    "3d": (lambda: nn.Conv3d(2, 4, 2, padding=1), (4, 2, 2, 3, 2)),
    "1d-transposed": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 0), (4, 4, 5)),
}
STRATEGIES = [
    (RowSample(0.6), Moment.COTANGENT),
    (RowSample(0.6, scores=ProductNorm()), Moment.COTANGENT),
    (RowSample(0.6, scores=Uniform(), design=Pivotal()), Moment.COTANGENT),
    (RowSample(0.6, design=WinnerTakeAll()), Moment.COTANGENT),
    (RowSample(0.6, design=Poisson()), Moment.COTANGENT),
    (ExampleSample(0.6), Moment.COTANGENT),
    (ExampleSample(0.6, scores=ProductNorm()), Moment.COTANGENT),
    (ExampleSample(0.6, scores=JointNorm(), design=WithReplacement()), Moment.COTANGENT),
    (ColumnSample(0.6), Moment.COTANGENT),
    (ColumnSample(0.6, scores=ColumnNorm()), Moment.COTANGENT),
    (ColumnSample(0.6, scores=JointNorm(), design=WithReplacement()), Moment.COTANGENT),
    (ElementMask(0.6), Moment.COTANGENT),
    (RowProjection(0.8), Moment.COTANGENT),
    (RowProjection(0.8, Hadamard()), Moment.COTANGENT),
    (LowRank(3), Moment.COTANGENT),
    (RowSample(0.6), Moment.STORED),
    (RowSample(0.6, scores=Uniform()), Moment.STORED),
    (RowSample(0.6, scores=PredictedNorm()), Moment.STORED),
    (ExampleSample(0.6), Moment.STORED),
    (FeatureSample(0.6), Moment.STORED),
    (FeatureSample(0.6, rows_per_mask=7), Moment.STORED),
    (ElementMask(0.6), Moment.STORED),
    (RowProjection(0.8, CountSketch()), Moment.STORED),
    (LowRank(2), Moment.STORED),
    (StochasticRounding(2, group=8), Moment.STORED),
]
CASES = [
    pytest.param(layer, strategy, moment, id=f"{layer}-{moment.value}-{strategy!r}")
    # Every layer takes every third strategy, so that each strategy meets two kinds of layer.
    for place, layer in enumerate(LAYERS)
    for strategy, moment in STRATEGIES[place % 3 :: 3]
]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def layer_named(name: str) -> Layer:
    make, shape = LAYERS[name]
    return build(make(), shape)


def predict(layer: Layer, strategy, moment):
    return convolution_variance(strategy, moment, layer.x, layer.parameters[0], layer.grad, layer.config)


def check(layer: Layer, strategy, moment) -> None:
    """Draw, and compare mean and variance of dX and dW with truth and law."""
    law = predict(layer, strategy, moment)
    plan = plan_of(strategy, moment)
    sizes = [
        draws_needed(variance.item(), exact)
        for variance, exact in zip((law.input, law.weight), layer.exact, strict=False)
        if not variance.isnan()
    ]
    drawn = draw_gradients(layer, plan, max(sizes))
    for ours, exact, variance in zip(drawn, layer.exact, (law.input, law.weight), strict=False):
        if variance == 0:
            torch.testing.assert_close(ours, exact.expand_as(ours), rtol=1e-9, atol=1e-11)
        elif variance.isnan():
            assert_unbiased(ours, exact, largest_relative_error=0.05)
        else:
            assert_unbiased(ours, exact)
            assert_variance(ours, exact, variance.item())


@pytest.mark.parametrize(("name", "strategy", "moment"), CASES)
def test_unbiased_with_the_predicted_variance(name, strategy, moment):
    check(layer_named(name), strategy, moment)


@pytest.mark.parametrize(
    ("strategy", "moment"),
    [
        (RowSample(0.6, design=Poisson()), Moment.COTANGENT),
        (ExampleSample(0.6, design=Poisson()), Moment.COTANGENT),
        (ColumnSample(0.6, design=Poisson()), Moment.COTANGENT),
        (ExampleSample(0.6, design=Poisson()), Moment.STORED),
        (FeatureSample(0.6, design=Poisson()), Moment.STORED),
        (LowRank(4, refresh=3), Moment.STORED),
    ],
    ids=repr,
)
def test_eager_steps_are_unbiased(strategy, moment):
    layer = layer_named("1d-transposed")
    plan = plan_of(strategy, moment)
    steps = [run(layer, plan)[1][:2] for _ in range(1500)]
    for drawn, exact in zip(zip(*steps, strict=True), layer.exact, strict=False):
        assert_unbiased(torch.stack(drawn), exact, largest_relative_error=0.04)


@pytest.mark.parametrize("scores", [None, ProductNorm(), StoredNorm()])
@pytest.mark.parametrize("stored", [StochasticRounding(4, group=8), RowSample(0.6), ExampleSample(0.6)])
@pytest.mark.parametrize("kind", [RowSample, ExampleSample, ColumnSample])
def test_both_moments_together_are_unbiased(kind, stored, scores):
    if kind is ColumnSample and scores is not None:
        scores = ColumnNorm()
    layer = layer_named("1d-transposed")
    plan = Plan(stored=stored, cotangent=kind(0.75, scores=scores))
    grad_input, grad_weight, _ = draw_gradients(layer, plan, 4_000)
    assert_unbiased(grad_input, layer.exact[0], largest_relative_error=0.03)
    assert_unbiased(grad_weight, layer.exact[1], largest_relative_error=0.03)


# --- twins that are wrong --------------------------------------------------------------------------------------------

GATHER = _convolution_products.gather_patches


def ignore_dilation(sliding, geometry, kernel, size, index_K):
    return GATHER(sliding, replace(geometry, dilation=(1,) * len(kernel)), kernel, size, index_K)


def wrap_around(sliding, geometry, kernel, size, index_K):
    sides = [side for size in reversed(geometry.padding) for side in (size, size)]
    padded = functional.pad(sliding, sides, mode="circular")
    return GATHER(padded, replace(geometry, padding=(0,) * len(kernel)), kernel, size, index_K)


@pytest.mark.parametrize("twin", [ignore_dilation, wrap_around], ids=lambda twin: twin.__name__)
@pytest.mark.parametrize("name", ["2d-grouped", "2d-transposed"])
def test_wrong_windows_are_caught(monkeypatch, twin, name):
    layer = layer_named(name)
    if name == "2d-transposed" and twin is ignore_dilation:
        layer = build(nn.ConvTranspose2d(4, 8, 2, 2, 1, 1, dilation=2, groups=2), (5, 4, 4, 3))
    monkeypatch.setattr(_convolution_products, "gather_patches", twin)
    drawn = draw_gradients(layer, Plan(cotangent=RowSample(0.6, scores=Uniform())), 10_000)[1]
    with pytest.raises(AssertionError, match="biased"):
        assert_unbiased(drawn, layer.exact[1], largest_relative_error=0.02)


def forget_weights(selection: Selection, tensor: Tensor, dim: int = 0) -> Tensor:
    return selection.gather(tensor, dim)


@pytest.mark.parametrize(
    ("strategy", "moment"),
    [
        (ExampleSample(0.6), Moment.COTANGENT),
        (ColumnSample(0.6), Moment.COTANGENT),
        (RowSample(0.6), Moment.STORED),
        (ExampleSample(0.6), Moment.STORED),
        (FeatureSample(0.6), Moment.STORED),
        (ElementMask(0.6), Moment.STORED),
        (LowRank(2), Moment.STORED),
    ],
    ids=repr,
)
def test_missing_weights_are_caught(monkeypatch, strategy, moment):
    monkeypatch.setattr(Selection, "apply", forget_weights)
    with pytest.raises(AssertionError, match="biased"):
        check(layer_named("2d-transposed"), strategy, moment)


@pytest.mark.parametrize(("name", "strategy", "moment"), CASES[::5])
def test_wrong_variances_are_caught(name, strategy, moment):
    layer = layer_named(name)
    drawn = draw_gradients(layer, plan_of(strategy, moment), 4_000)[1]
    with pytest.raises(AssertionError, match="measured"):
        assert_variance(drawn, layer.exact[1], 1.12 * predict(layer, strategy, moment).weight.item())


def test_inconclusive_is_a_failure():
    layer = layer_named("2d-grouped")
    drawn = draw_gradients(layer, Plan(cotangent=RowSample(0.2)), 100)[1]
    with pytest.raises(AssertionError, match="inconclusive"):
        assert_unbiased(drawn, layer.exact[1])


# --- laws ------------------------------------------------------------------------------------------------------------


def test_laws_that_are_not_stated_say_so():
    layer = layer_named("2d-reflect")
    for strategy in (RowProjection(0.5), LowRank(2), ElementMask(0.5)):
        law = predict(layer, strategy, Moment.COTANGENT)
        assert math.isnan(law.input)
        assert law.weight > 0


def test_law_takes_unbatched_inputs():
    layer = build(nn.Conv2d(4, 6, 3), (1, 4, 5, 6))
    for strategy in (RowSample(0.5), ColumnSample(0.5), ElementMask(0.5)):
        batched = predict(layer, strategy, Moment.COTANGENT)
        single = convolution_variance(
            strategy, Moment.COTANGENT, layer.x[0], layer.parameters[0], layer.grad[0], layer.config
        )
        assert (batched.input, batched.weight) == (single.input, single.weight)


COSTED = [
    (RowSample(0.5), Moment.COTANGENT),
    (ExampleSample(0.5), Moment.COTANGENT),
    (ColumnSample(0.5, scores=Uniform()), Moment.COTANGENT),
    (ElementMask(0.5), Moment.COTANGENT),
    (RowProjection(0.5), Moment.COTANGENT),
    (LowRank(2), Moment.COTANGENT),
    (RowSample(0.5), Moment.STORED),
    (ExampleSample(0.5), Moment.STORED),
    (FeatureSample(0.5, scores=Uniform()), Moment.STORED),
    (RowProjection(0.5), Moment.STORED),
    (LowRank(2), Moment.STORED),
    (StochasticRounding(4), Moment.STORED),
]


@pytest.mark.parametrize("name", ["2d-reflect", "1d-same", "1d-transposed", "3d"])
@pytest.mark.parametrize(("strategy", "moment"), COSTED, ids=repr)
def test_predicted_flops_are_the_measured_ones(name, strategy, moment):
    layer = layer_named(name)
    shape = ConvolutionShape.of(layer.x, layer.parameters[0], layer.config)
    with FlopCounterMode(display=False) as counter:
        run(layer, plan_of(strategy, moment))
    measured = counter.get_total_flops() - shape.product_flops
    if isinstance(strategy, RowSample) and moment is Moment.COTANGENT and shape.transposed:
        # Scores are not part of the prediction; here they are norms of windows, computed with one channel.
        measured -= 2 * layer.x[:, 0].numel() * shape.weight_shape[2]
    assert measured == pytest.approx(convolution_flops(strategy, moment, shape), rel=1e-12)


def test_exact_flops_of_grouped_layers():
    for name in ("2d-grouped", "2d-transposed"):
        layer = layer_named(name)
        shape = ConvolutionShape.of(layer.x, layer.parameters[0], layer.config)
        groups, kernel = 2, 9 if name == "2d-grouped" else 6
        centre = layer.x if shape.transposed else layer.grad
        exact = 2 * centre[:, 0].numel() * 8 * 4 // groups * kernel
        assert shape.product_flops == exact
        assert convolution_flops(None, Moment.COTANGENT, shape) == 2 * exact
        assert convolution_flops(ColumnSample(0.5), Moment.COTANGENT, shape) == exact


@pytest.mark.parametrize("name", list(LAYERS))
@pytest.mark.parametrize(
    ("strategy", "moment"), [case for case in COSTED if case[1] is Moment.STORED] + [(None, Moment.STORED)], ids=repr
)
def test_predicted_bytes_are_the_saved_ones(name, strategy, moment):
    layer = layer_named(name)
    weight = layer.parameters[0].float().requires_grad_()
    x = layer.x.float()
    plan = Plan() if strategy is None else plan_of(strategy, moment)
    saved: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        output = sketched_convolution(x, weight, None, layer.config, plan)
    saved.pop(weight.untyped_storage().data_ptr(), None)
    predicted = convolution_saved_bytes(strategy, moment, ConvolutionShape.of(x, weight, layer.config))
    assert sum(saved.values()) == predicted
    assert output.requires_grad


def test_shape_of_an_unbatched_input():
    module = nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular")
    config = ConvolutionConfig.from_module(module)
    shape = ConvolutionShape.of(torch.ones(2, 5), module.weight, config)
    assert (shape.input_shape, shape.output_shape) == ((1, 2, 7), (1, 4, 5))
