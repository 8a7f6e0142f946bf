"""Activations: forward bit for bit, slopes by definition, exact branches, unbiased slopes of the stated variance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from cheapgrad.cost import measure_held_bytes
from cheapgrad.errors import PlacementError, UnknownNameError
from cheapgrad.ops.activation import Activation, activation_names
from cheapgrad.ops.activations import sketched_activation
from cheapgrad.ops.stored_derivative import apply_derivative, store_derivative
from cheapgrad.sketch import RowSample, StochasticRounding, fusing
from cheapgrad.sketch.fixed_range import FixedRange
from tests.networks.blocks import composite_gelu
from tests.ops.convolution_cases import assert_unbiased
from tests.oracles import activations as oracle
from tests.oracles import rounding
from tests.sketch.enumeration import feed

ALL = [Activation(name, options) for name, options in oracle.SLOPES]
SMOOTH = [activation for activation in ALL if activation.slope_kind == "smooth"]
LINEAR = [activation for activation in ALL if activation.slope_kind != "smooth"]
FOUR_BITS = StochasticRounding(4)

TORCH = {
    "gelu": functional.gelu,
    "gelu_written_out": composite_gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": functional.silu,
    "mish": functional.mish,
    "hardswish": functional.hardswish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": functional.softplus,
    "log_sigmoid": functional.logsigmoid,
    "elu": functional.elu,
    "celu": functional.celu,
    "selu": functional.selu,
    "relu": functional.relu,
    "leaky_relu": functional.leaky_relu,
    "relu6": functional.relu6,
    "hardtanh": functional.hardtanh,
    "hardsigmoid": functional.hardsigmoid,
    "softsign": functional.softsign,
    "tanhshrink": functional.tanhshrink,
    "hardshrink": functional.hardshrink,
    "softshrink": functional.softshrink,
    "threshold": functional.threshold,
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (1,), (7,), (3, 64), (5, 100), (2, 3, 17), (2, 3, 5, 7), (2, 2, 2, 2, 3)]


def named(activation):
    return f"{activation.name}{dict(activation.options) or ''}"


def inputs(*shape, dtype=torch.float64, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def stock(activation, x):
    return TORCH[activation.name](x, **dict(activation.options))


def gradients(x, activation, grad, strategy=FOUR_BITS):
    leaf = x.detach().clone().requires_grad_()
    y = sketched_activation(leaf, activation, strategy)
    return y.detach(), torch.autograd.grad(y, leaf, grad)[0]


def stock_gradients(x, activation, grad):
    leaf = x.detach().clone().requires_grad_()
    y = stock(activation, leaf)
    return y.detach(), torch.autograd.grad(y, leaf, grad)[0]


def test_every_activation_has_an_oracle():
    assert {activation.name for activation in ALL} == set(activation_names()) == set(TORCH)


@pytest.mark.parametrize("activation", ALL, ids=named)
def test_slopes_are_those_of_the_definition_and_within_the_interval(activation):
    x = torch.cat([torch.linspace(-40, 40, 100_001, dtype=torch.float64), inputs(10_000, scale=0.1)])
    x = x[(x.abs() - x.abs().round()).abs() > 1e-9]
    slope = activation.derivative(x, activation.forward(x))
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(slope, oracle.SLOPES[activation.name, activation.options](x.numpy()), atol=1e-12)
    if activation.slope_kind == "smooth":
        for bits in (2, 4, 8):
            grid = activation.codec(bits).grid
            position = (slope - grid.low) / grid.step
            assert position.min() >= -1e-9
            assert position.max() <= 2**bits - 1 + 1e-9
            finest = (slope.max() - slope.min()) / (2**bits - 1)
            assert grid.step <= 1.26 * finest, "the grid is wasted on slopes that do not occur"


@pytest.mark.parametrize("activation", ALL, ids=named)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_is_bit_identical(activation, dtype):
    for shape in SHAPES:
        x = inputs(*shape, dtype=dtype)
        y, gradient = gradients(x, activation, torch.ones_like(x))
        assert torch.equal(y, stock(activation, x))
        assert gradient.shape == x.shape
        assert gradient.dtype == dtype


@pytest.mark.parametrize("activation", LINEAR, ids=named)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", [None, FOUR_BITS], ids=repr)
def test_gradients_of_piecewise_linear_activations_are_exact_at_kinks_and_beyond_numbers_too(
    activation, dtype, strategy
):
    special = torch.tensor([0.0, -0.0, 1, -1, 3, -3, 6, -0.5, 2, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    for shape in SHAPES:
        x, grad = inputs(*shape, dtype=dtype), inputs(*shape, dtype=dtype, seed=1)
        if len(shape) == 2:
            x.view(-1)[: special.numel()], grad.view(-1)[-special.numel() :] = special, special
        _, ours = gradients(x, activation, grad, strategy)
        _, exact = stock_gradients(x, activation, grad)
        assert torch.equal(ours.nan_to_num(7.0), exact.nan_to_num(7.0))


@pytest.mark.parametrize("activation", SMOOTH, ids=named)
def test_without_a_strategy_a_smooth_activation_is_exact(activation):
    x, grad = inputs(3, 5), inputs(3, 5, seed=1)
    assert torch.equal(gradients(x, activation, grad, None)[1], stock_gradients(x, activation, grad)[1])
    y = activation.forward(x)
    exact = stock_gradients(x, activation, grad)[1]
    stored = store_derivative(x, y, activation, None)
    torch.testing.assert_close(apply_derivative(stored, grad), exact, rtol=1e-12, atol=1e-14)
    kept = torch.tensor([2, 0])
    torch.testing.assert_close(apply_derivative(stored, grad[kept], kept), exact[kept], rtol=1e-12, atol=1e-14)


def enumerate_gradients(activation, x_I, grad_I, bits, monkeypatch):
    """Return the chances ``[M]`` of all outcomes of the draw that a row shares, and the gradient in each ``[M, I]``."""
    grid = activation.codec(bits).grid
    slope_I = activation.derivative(x_I, activation.forward(x_I)).numpy()
    _, _, up_I = rounding.lower_upper_chance(slope_I, grid.low, grid.step)
    outcomes = rounding.outcomes_of_a_draw(up_I, np.array(rounding.mirrored_digits(x_I.numel())))
    feed(monkeypatch, np.array([middle for middle, _, _ in outcomes]))
    count = len(outcomes)
    drawn = gradients(x_I.repeat(count, 1), activation, grad_I.repeat(count, 1), StochasticRounding(bits))[1]
    return np.array([length for _, length, _ in outcomes]), drawn.numpy()


def assert_mean_and_variance(chances, drawn, exact_I, variance):
    """Draws are fed in single precision: pieces shorter than its unit, 6e-8, may be taken for their neighbours."""
    assert chances.sum() == pytest.approx(1, rel=1e-12)
    error = drawn - exact_I.numpy()
    np.testing.assert_allclose(chances @ error, 0, atol=1e-5, err_msg="biased")
    np.testing.assert_allclose(chances @ (error**2).sum(1), variance, rtol=1e-4, err_msg="variance")


def predicted_variance(activation, x, grad, bits):
    slope = activation.derivative(x, activation.forward(x))
    return (activation.codec(bits).entry_variance(slope) * grad.square()).sum().item()


@pytest.mark.parametrize("activation", SMOOTH, ids=named)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_outcome_of_a_row_makes_up_the_gradient_and_the_stated_variance(activation, bits, monkeypatch):
    x, grad = inputs(60, scale=1.5), inputs(60, seed=1)
    exact = stock_gradients(x, activation, grad)[1]
    chances, drawn = enumerate_gradients(activation, x, grad, bits, monkeypatch)
    assert len(chances) > 50
    assert_mean_and_variance(chances, drawn, exact, predicted_variance(activation, x, grad, bits))


#: Which of the slopes 0 and that of most entries lie on the grid of 2 bits; at 4 and 8 bits both do.
ON_TWO_BITS = {
    **dict.fromkeys(["tanh", "sigmoid", "softplus", "log_sigmoid", "softsign", "tanhshrink", "elu", "celu"], (0, 1)),
    "selu": (0,),
}


@pytest.mark.parametrize("activation", [one for one in SMOOTH if not one.options], ids=named)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_which_slopes_are_free_of_noise(activation, bits):
    at = {"tanh": 0.0, "sigmoid": 0.0, "softsign": 0.0, "log_sigmoid": -40.0}.get(activation.name, 40.0)
    x = torch.tensor([at], dtype=torch.float64)
    slope = activation.derivative(x, activation.forward(x))
    variance = activation.codec(bits).entry_variance(torch.cat([torch.zeros_like(slope), slope]))
    expected = ON_TWO_BITS.get(activation.name, ()) if bits == 2 else (0, 1)
    assert tuple((variance < 1e-12).nonzero().flatten().tolist()) == expected
    assert variance[variance >= 1e-12].gt(1e-3).all()


@pytest.mark.parametrize(("dtype", "mistaken"), [(torch.float64, 0), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_linear_parts_of_hardswish_are_exact_from_four_bits_on(bits, dtype, mistaken):
    ends = [torch.linspace(-9, -3, 33)[:-1], torch.linspace(3, 9, 33)[1:], torch.linspace(-2.9, 2.9, 64)]
    x = torch.cat(ends).to(dtype).repeat(2000, 1)
    torch.manual_seed(0)
    error = gradients(x, Activation("hardswish"), torch.ones_like(x), StochasticRounding(bits))[1].double()
    error -= stock_gradients(x, Activation("hardswish"), torch.ones_like(x))[1].double()
    linear, curved = error[:, :64], error[:, 64:]
    if bits == 2:
        # 0 and 1 lie a quarter and three quarters of a step of 2/3 above the grid: (2/3)**2 * 3/16.
        torch.testing.assert_close(linear.square().mean(0), torch.full((64,), 1 / 12).double(), rtol=0.1, atol=0)
    else:
        # In single precision a dither near 1 may be rounded up to it.
        assert (linear.abs() > 1e-6).double().mean() <= mistaken
    assert (curved.abs() > 1e-6).double().mean() > 0.5, "nothing is vacuous"


class RoundsToNearest(FixedRange):
    """A twin that rounds to the nearest grid point."""

    def draw(self, like, rows, columns):
        dither = super().draw(like, rows, columns)
        return replace(dither, draws=torch.full_like(dither.draws, 0.5), shifts=torch.zeros_like(dither.shifts))


class RoundsDown(FixedRange):
    """A twin whose draws reach only nine tenths of the way."""

    def draw(self, like, rows, columns):
        dither = super().draw(like, rows, columns)
        return replace(dither, draws=dither.draws * 0.9)


class CoarserGrid(FixedRange):
    """A twin of the right mean and a variance that is not the stated one."""

    def entry_variance(self, values):
        return 1.01 * super().entry_variance(values)


@pytest.mark.parametrize("twin", [RoundsToNearest, RoundsDown])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_biased_twins_are_caught(twin, bits, monkeypatch):
    activation, x, grad = Activation("gelu"), inputs(60, scale=1.5), inputs(60, seed=1)
    codec, variance = activation.codec(bits), predicted_variance(activation, x, grad, bits)
    monkeypatch.setattr(Activation, "codec", lambda self, bits: twin(codec.grid))
    outcomes = enumerate_gradients(activation, x, grad, bits, monkeypatch)
    with pytest.raises(AssertionError, match="biased"):
        assert_mean_and_variance(*outcomes, stock_gradients(x, activation, grad)[1], variance)


def test_a_wrong_variance_is_caught(monkeypatch):
    activation, x, grad = Activation("silu"), inputs(60), inputs(60, seed=1)
    codec = activation.codec(4)
    monkeypatch.setattr(Activation, "codec", lambda self, bits: CoarserGrid(codec.grid))
    outcomes = enumerate_gradients(activation, x, grad, 4, monkeypatch)
    exact, variance = stock_gradients(x, activation, grad)[1], predicted_variance(activation, x, grad, 4)
    with pytest.raises(AssertionError, match="variance"):
        assert_mean_and_variance(*outcomes, exact, variance)


@pytest.mark.parametrize("features", [24, 64, 100, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["gelu", "tanh"])
def test_real_draws_are_unbiased_in_every_dtype(name, dtype, features):
    """Random directions, which no rarely rounded entry can spoil, with a cotangent of ones: products stay exact."""
    torch.manual_seed(0)
    draws, activation, x = 3000, Activation(name), inputs(1, features, dtype=dtype)
    stacked = x.repeat(draws, 1)
    drawn = gradients(stacked, activation, torch.ones_like(stacked))[1].double()
    exact = activation.derivative(x.double(), activation.forward(x).double())
    projected = (drawn - exact) @ torch.randn(features, 20, dtype=torch.float64)
    # Slopes are decoded in single precision and rounded to the dtype, which is worth half a unit each, at random.
    rounding_error = torch.finfo(dtype).eps * features**0.5
    assert (projected.mean(0).abs() <= 5 * projected.std(0) / draws**0.5 + rounding_error).all()
    assert projected.std() > 0.01


@pytest.mark.parametrize("activation", [Activation("gelu"), Activation("relu"), Activation("sigmoid")], ids=named)
@pytest.mark.parametrize("features", [64, 24, 100])
def test_rows_are_those_of_the_whole(activation, features):
    x, grad = inputs(9, features, dtype=torch.float32), inputs(9, features, dtype=torch.float32, seed=1)
    stored = store_derivative(x, activation.forward(x), activation, FOUR_BITS)
    whole = apply_derivative(stored, grad)
    index = torch.tensor([8, 0, 3, 3])
    assert torch.equal(apply_derivative(stored, grad[index], index), whole[index])
    assert torch.equal(apply_derivative(stored, grad.view(3, 3, features)), whole.view(3, 3, features))


@pytest.mark.parametrize("activation", [Activation("gelu"), Activation("leaky_relu")], ids=named)
@pytest.mark.parametrize("shape", [(50, 24), (9, 128), (40, 7)])
def test_working_in_pieces_changes_nothing(activation, shape, monkeypatch):
    x, grad = inputs(*shape, dtype=torch.float32), inputs(*shape, dtype=torch.float32, seed=1)
    results = []
    for piece in (1 << 17, 500):
        monkeypatch.setattr(fusing, "_PIECE", piece)
        torch.manual_seed(0)
        results.append(gradients(x, activation, grad))
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("activation", SMOOTH, ids=named)
def test_a_nan_reaches_the_gradient(activation):
    x = inputs(4, 70, dtype=torch.float32)
    x[2, 5] = torch.nan
    _, gradient = gradients(x, activation, torch.ones_like(x))
    assert gradient[2, 5].isnan()
    assert gradient[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize(
    ("activation", "bytes_per_row"), [(Activation("relu"), 16), (Activation("gelu"), 64 + 2), (Activation("tanh"), 66)]
)
def test_bytes_held(activation, bytes_per_row):
    x = inputs(32, 128, dtype=torch.float32).requires_grad_()
    # The output is the caller's; nothing but codes is held by the operation.
    held = measure_held_bytes(lambda: sketched_activation(x, activation, FOUR_BITS).sum())
    assert held.total_bytes == 32 * bytes_per_row


@pytest.mark.parametrize("activation", ALL, ids=named)
def test_what_pytorch_holds_is_stated(activation):
    x = inputs(32, 128, dtype=torch.float32).requires_grad_()
    held = measure_held_bytes(lambda: stock(activation, x))
    assert held.total_bytes == activation.stock_tensors("cpu") * x.numel() * x.element_size()


def test_nothing_is_kept_where_no_gradient_is_needed():
    x = inputs(4, 8)
    assert not sketched_activation(x, Activation("gelu"), FOUR_BITS).requires_grad
    with torch.no_grad():
        sketched_activation(x.requires_grad_(), Activation("relu"), FOUR_BITS)
    assert sketched_activation(torch.zeros(0, 8, requires_grad=True), Activation("gelu"), FOUR_BITS).shape == (0, 8)


def test_the_output_may_be_changed_in_place():
    x = inputs(4, 8, dtype=torch.float32).requires_grad_()
    y = sketched_activation(x, Activation("relu"), FOUR_BITS)
    y.mul_(2)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, 2.0 * (x > 0))


def test_bad_input():
    with pytest.raises(UnknownNameError, match=r"unknown activation 'gelo'; did you mean 'gelu'.*known: .*celu"):
        Activation("gelo")
    with pytest.raises(UnknownNameError, match="leaky_relu has no option 'slope'; did you mean 'negative_slope'"):
        Activation("leaky_relu", (("slope", 0.1),))
    with pytest.raises(UnknownNameError, match=r"tanh has no option .alpha. \(options: none"):
        Activation("tanh", (("alpha", 0.1),))
    x = inputs(4, 8).requires_grad_()
    with pytest.raises(PlacementError, match=r"RowSample\(keep=0.5\) cannot store the slope of gelu"):
        sketched_activation(x, Activation("gelu"), RowSample(0.5))


def test_layers_train_alike():
    """A network's gradient, its activation sketched, is unbiased."""
    torch.manual_seed(0)
    first, second, x = nn.Linear(8, 16).double(), nn.Linear(16, 4).double(), inputs(6, 8)

    def gradient(activate):
        loss = second(activate(first(x))).square().sum()
        return torch.autograd.grad(loss, first.weight)[0]

    exact = gradient(functional.gelu)
    drawn = torch.stack([gradient(lambda h: sketched_activation(h, Activation("gelu"), FOUR_BITS)) for _ in range(400)])
    assert_unbiased(drawn, exact, largest_relative_error=0.02)
