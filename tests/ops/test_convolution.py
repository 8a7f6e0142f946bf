"""Sketched convolutions: exact where nothing is dropped, refusals, saved tensors and contexts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cheapgrad.errors import ForwardModeError, SecondDerivativeError, ShapeError, UnknownNameError
from cheapgrad.ops.convolution import ConvolutionConfig, sketched_convolution
from cheapgrad.ops.plan import Plan
from cheapgrad.sketch import (
    ColumnSample,
    ElementMask,
    ExampleSample,
    FeatureSample,
    LowRank,
    Moment,
    Poisson,
    PredictedNorm,
    ProductNorm,
    RowProjection,
    RowSample,
    StochasticRounding,
)
from tests.ops.convolution_cases import build, geometries, plan_of, run

GEOMETRIES = [pytest.param(module, shape, id=name) for name, module, shape in geometries()]
# Budgets that round to all atoms: the sketching code runs, and must give the exact gradient.
ALL = 1 - 1e-9
COMPLETE = [
    (RowSample(ALL), Moment.COTANGENT),
    (RowSample(ALL, scores=ProductNorm()), Moment.COTANGENT),
    (ExampleSample(ALL), Moment.COTANGENT),
    (ColumnSample(ALL), Moment.COTANGENT),
    (ElementMask(ALL), Moment.COTANGENT),
    (LowRank(6), Moment.COTANGENT),
    (RowSample(ALL), Moment.STORED),
    (ExampleSample(ALL), Moment.STORED),
    (FeatureSample(ALL), Moment.STORED),
    (FeatureSample(ALL, rows_per_mask=5), Moment.STORED),
    (LowRank(4), Moment.STORED),
]
PARTIAL = [
    (RowSample(0.5), Moment.COTANGENT),
    (ExampleSample(0.5), Moment.COTANGENT),
    (ColumnSample(0.5), Moment.COTANGENT),
    (ElementMask(0.5), Moment.COTANGENT),
    (RowProjection(0.5), Moment.COTANGENT),
    (LowRank(2), Moment.COTANGENT),
    (RowSample(0.5), Moment.STORED),
    (ExampleSample(0.5), Moment.STORED),
    (FeatureSample(0.5), Moment.STORED),
    (ElementMask(0.5), Moment.STORED),
    (RowProjection(0.5), Moment.STORED),
    (LowRank(2), Moment.STORED),
    (StochasticRounding(4), Moment.STORED),
]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


PARTIAL_IDS = [f"{moment.value}-{strategy!r}" for strategy, moment in PARTIAL]


def small_layer(dtype: torch.dtype = torch.float64):
    return build(nn.Conv2d(4, 6, 3, padding=1), (4, 4, 5, 6), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("module", "shape"), GEOMETRIES)
def test_no_strategy_is_bit_identical(module, shape, dtype):
    layer = build(module, shape, dtype)
    for plan in (Plan(), Plan(stored=RowSample(1.0), cotangent=RowSample(1.0))):
        output, gradients = run(layer, plan)
        assert torch.equal(output, module(layer.x))
        assert all(torch.equal(ours, stock) for ours, stock in zip(gradients, layer.exact, strict=True))


@pytest.mark.parametrize(("module", "shape"), GEOMETRIES)
def test_complete_samples_give_the_exact_gradients(module, shape):
    layer = build(module, shape)
    for strategy, moment in COMPLETE:
        output, gradients = run(layer, plan_of(strategy, moment))
        assert torch.equal(output, module(layer.x))
        for ours, stock in zip(gradients, layer.exact, strict=True):
            torch.testing.assert_close(ours, stock, rtol=1e-9, atol=1e-11, msg=f"{strategy!r} {moment}")


@pytest.mark.parametrize(("strategy", "moment"), PARTIAL, ids=PARTIAL_IDS)
def test_what_is_not_sketched_is_exact(strategy, moment):
    layer = small_layer()
    output, (grad_input, _, grad_bias) = run(layer, plan_of(strategy, moment))
    assert torch.equal(output, layer.module(layer.x))
    torch.testing.assert_close(grad_bias, layer.exact[2])
    if moment is Moment.STORED or isinstance(strategy, RowSample):
        torch.testing.assert_close(grad_input, layer.exact[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("strategy", "moment"), PARTIAL, ids=PARTIAL_IDS)
def test_gradients_have_the_dtype_of_the_layer(strategy, moment, dtype):
    layer = small_layer(dtype)
    _, gradients = run(layer, plan_of(strategy, moment))
    assert all(gradient.dtype == dtype and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(("strategy", "moment"), PARTIAL, ids=PARTIAL_IDS)
def test_steps_draw_anew(strategy, moment):
    layer = small_layer()
    plan = plan_of(strategy, moment)
    assert not torch.equal(run(layer, plan)[1][1], run(layer, plan)[1][1])


def test_one_output_channel_per_group_leaves_nothing_to_sample():
    layer = build(nn.Conv2d(4, 4, 3, groups=4), (3, 4, 6, 6))
    _, gradients = run(layer, Plan(cotangent=ColumnSample(0.5)))
    for ours, stock in zip(gradients, layer.exact, strict=True):
        torch.testing.assert_close(ours, stock)


def test_every_group_keeps_as_many_output_channels():
    layer = build(nn.ConvTranspose1d(4, 12, 3, groups=2), (3, 4, 6))
    _, (_, grad_weight, _) = run(layer, Plan(cotangent=ColumnSample(0.5)))
    kept_QO = grad_weight.view(2, 2, 6, 3).abs().amax((1, 3)) > 0
    assert kept_QO.sum(1).tolist() == [3, 3]


@pytest.mark.parametrize("moment", list(Moment))
def test_samples_of_random_size_may_come_out_empty(moment):
    layer = build(nn.Conv1d(2, 2, 2), (2, 2, 3))
    kinds = {
        Moment.COTANGENT: (RowSample, ExampleSample, ColumnSample),
        Moment.STORED: (RowSample, ExampleSample, FeatureSample),
    }
    for kind in kinds[moment]:
        draws = [run(layer, plan_of(kind(0.3, design=Poisson()), moment))[1][1] for _ in range(60)]
        assert any((draw == 0).all() for draw in draws), kind
        assert any((draw != 0).any() for draw in draws), kind


@pytest.mark.parametrize(("strategy", "moment"), PARTIAL, ids=PARTIAL_IDS)
def test_nan_is_never_hidden(strategy, moment):
    layer = small_layer(torch.float32)
    plan = plan_of(strategy, moment)
    layer.x[2, 1, 2, 3] = float("nan")
    for _ in range(5):
        assert run(layer, plan)[1][1].isnan().any()
    layer.x[2, 1, 2, 3] = 0.0
    layer.grad[1, 2, 2, 3] = float("nan")
    for _ in range(5):
        grad_input, grad_weight, grad_bias = run(layer, plan)[1]
        assert grad_input.isnan().any()
        assert grad_weight.isnan().any()
        assert grad_bias.isnan().any()


@pytest.mark.parametrize(("strategy", "moment"), PARTIAL, ids=PARTIAL_IDS)
def test_unbatched_inputs(strategy, moment):
    layer = build(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (1, 4, 5, 6))
    module, x = layer.module, layer.x[0].clone().requires_grad_()
    plan = plan_of(strategy, moment)
    output = sketched_convolution(x, module.weight, module.bias, layer.config, plan)
    assert torch.equal(output, module(x))
    output.backward(layer.grad[0])
    assert x.grad.shape == x.shape
    assert module.weight.grad.isfinite().all()


@pytest.mark.parametrize(("strategy", "moment"), PARTIAL, ids=PARTIAL_IDS)
def test_empty_batches(strategy, moment):
    layer = small_layer()
    x = layer.x[:0].clone().requires_grad_()
    plan = plan_of(strategy, moment)
    output = sketched_convolution(x, layer.module.weight, layer.module.bias, layer.config, plan)
    gradients = torch.autograd.grad(output.sum(), (x, layer.module.weight))
    assert [gradient.shape for gradient in gradients] == [x.shape, layer.module.weight.shape]
    assert (gradients[1] == 0).all()


def test_wrong_dimensions_raise_as_in_pytorch():
    module = nn.Conv2d(4, 6, 3)
    with pytest.raises(RuntimeError, match="conv2d"):
        sketched_convolution(
            torch.ones(4, 4), module.weight, None, ConvolutionConfig.from_module(module), Plan(stored=RowSample(0.5))
        )


@pytest.mark.parametrize(("strategy", "moment"), PARTIAL, ids=PARTIAL_IDS)
def test_frozen_weight_saves_nothing_but_itself(strategy, moment):
    layer = small_layer(torch.float32)
    weight = layer.module.weight.detach()
    x = layer.x.clone().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        output = sketched_convolution(x, weight, None, layer.config, plan_of(strategy, moment))
    assert [tensor.data_ptr() for tensor in saved] == [weight.data_ptr()]
    output.backward(layer.grad)
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(("strategy", "moment"), PARTIAL, ids=PARTIAL_IDS)
def test_input_without_gradient_costs_no_product(strategy, moment):
    layer = small_layer(torch.float32)
    weight = layer.module.weight
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        output = sketched_convolution(layer.x, weight, None, layer.config, plan_of(strategy, moment))
    assert weight.data_ptr() not in [tensor.data_ptr() for tensor in saved]
    with FlopCounterMode(display=False) as counter:
        output.backward(layer.grad)
    counts = counter.get_flop_counts()["Global"]
    exact = 2 * layer.grad[:, 0].numel() * weight.numel()
    assert counts.get(torch.ops.aten.convolution_backward, 0) <= exact


@pytest.mark.parametrize(("strategy", "moment"), PARTIAL, ids=PARTIAL_IDS)
def test_second_derivatives_are_refused(strategy, moment):
    layer = small_layer()
    x = layer.x.clone().requires_grad_()
    module = layer.module
    output = sketched_convolution(x, module.weight, module.bias, layer.config, plan_of(strategy, moment))
    first = torch.autograd.grad(output.square().sum(), x, create_graph=True)[0]
    with pytest.raises(SecondDerivativeError, match=r"sketched convolution.*handle\.exact"):
        torch.autograd.grad(first.sum(), module.weight)


def test_forward_mode_is_refused():
    layer = small_layer()
    plan = Plan(cotangent=RowSample(0.5))
    with pytest.raises(ForwardModeError, match="sketched convolution"):
        torch.func.jvp(lambda x: sketched_convolution(x, *layer.parameters, layer.config, plan), (layer.x,), (layer.x,))


@pytest.mark.parametrize(("strategy", "moment"), PARTIAL, ids=PARTIAL_IDS)
def test_per_example_gradients_by_vmap(strategy, moment):
    layer = small_layer()
    weight, bias = layer.parameters
    plan = plan_of(strategy, moment)

    def loss(weight, x, grad):
        return (sketched_convolution(x, weight, bias, layer.config, plan) * grad).sum()

    images, grads = layer.x.unsqueeze(1), layer.grad.unsqueeze(1)
    per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="different")
    gradients = per_example(weight, images, grads)
    assert gradients.shape == (4, *weight.shape)
    assert gradients.isfinite().all()


def test_channels_last_stays():
    layer = small_layer(torch.float32)
    module = layer.module.to(memory_format=torch.channels_last)
    x = layer.x.to(memory_format=torch.channels_last).requires_grad_()
    for strategy, moment in PARTIAL:
        plan = plan_of(strategy, moment)
        output = sketched_convolution(x, module.weight, module.bias, layer.config, plan)
        grad = layer.grad.to(memory_format=torch.channels_last)
        assert torch.autograd.grad(output, x, grad)[0].is_contiguous(memory_format=torch.channels_last), strategy


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_autocast_keeps_low_precision_copies(mode):
    module = nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode)
    x = torch.randn(4, 4, 5, 6, requires_grad=True)
    saved = []
    with torch.autocast("cpu", torch.bfloat16):
        expected = module(x)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            output = sketched_convolution(
                x, module.weight, module.bias, ConvolutionConfig.from_module(module), Plan(cotangent=RowSample(0.5))
            )
    assert torch.equal(output, expected)
    # Reflection itself, PyTorch's own, keeps the unpadded input in single precision.
    assert {tensor.dtype for tensor in saved if tensor.data_ptr() != x.data_ptr()} == {torch.bfloat16}
    output.float().square().sum().backward()
    assert x.grad.dtype == module.weight.grad.dtype == torch.float32


def test_output_size_of_transposed_layers():
    module = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1)
    x = torch.randn(2, 2, 4, 4)
    config = ConvolutionConfig.from_module(module, x, [8, 7])
    output = sketched_convolution(x, module.weight, module.bias, config, Plan(stored=RowSample(0.5)))
    assert torch.equal(output, module(x, output_size=[8, 7]))


def test_predicted_scores_learn_from_the_cotangent():
    layer = small_layer()
    layer.grad[..., :3] = 0.0
    plan = plan_of(RowSample(0.5, scores=PredictedNorm()), Moment.STORED)
    assert plan.stored_memory.predict(120, 4, torch.device("cpu")) is None
    run(layer, plan)
    predicted = plan.stored_memory.predict(120, 4, torch.device("cpu")).view(4, 5, 6)
    # Windows of three columns: input columns 0 and 1 only meet output columns 0 to 2.
    assert predicted[..., :2].max() < 0.2 < predicted[..., 2:].min()


def test_compiled_steps_draw_once():
    module = nn.Conv1d(3, 3, 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.eye(3).unsqueeze(2))
    x = torch.eye(3).unsqueeze(0).requires_grad_()
    config = ConvolutionConfig.from_module(module)
    for plan in (Plan(stored=RowSample(0.34)), Plan(cotangent=RowSample(0.34))):
        step = torch.compile(
            lambda x, plan=plan: sketched_convolution(x, module.weight, None, config, plan),
            backend="aot_eager",
            fullgraph=True,
        )
        for _ in range(8):
            # X = I and G = diagonal: one kept pixel gives one diagonal entry, unless forward and backward disagree.
            gradient = torch.autograd.grad(step(x), module.weight, torch.diag(torch.tensor([1.0, 2, 4]))[None])[0]
            assert gradient.squeeze(2).diagonal().count_nonzero() == 1
            assert gradient.count_nonzero() == 1


def test_bad_paddings_are_named():
    with pytest.raises(UnknownNameError, match=r"'sam'.*did you mean 'same'"):
        ConvolutionConfig(padding="sam")
    with pytest.raises(ShapeError, match="stride=2"):
        ConvolutionConfig(padding="same", stride=2).resolve(torch.ones(1, 2, 5), torch.ones(2, 2, 3))
