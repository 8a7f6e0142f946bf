"""Codecs that are really compiled: the codes of one operation after the other, the same law, the same forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import cheapgrad
from cheapgrad import recipes
from cheapgrad.ops import stored_derivative
from cheapgrad.ops.activation import Activation
from cheapgrad.ops.stored_derivative import apply_derivative, store_derivative
from cheapgrad.sketch import DenseMatrix, Moment, Operands, StochasticRounding, _compiling, fusing, stochastic_rounding
from cheapgrad.sketch._codes import decode_groups, encode_groups
from cheapgrad.sketch.stochastic_rounding import rounding_steps
from tests.sketch.enumeration import feed

ROWS, COLUMNS = 512, 64
LAST_DITHER = 1 - 2.0**-24
DRAWS = 100
# Of 64 sums of 51200 independent errors each, at a family level of 1e-6.
LARGEST_Z = 5.7

pytestmark = pytest.mark.skipif(
    bool(_compiling.find_obstacle("cpu")), reason=f"nothing can be compiled: {_compiling.find_obstacle('cpu')}"
)


@pytest.fixture(autouse=True)
def _state(monkeypatch):
    """Compile in this process, with no pool of others; what an earlier test compiled is used again."""
    torch.manual_seed(0)
    with torch._inductor.config.patch(compile_threads=1):
        yield
    assert fusing.why_unfused() == ""


def hard_values(dtype: torch.dtype) -> torch.Tensor:
    """Return groups without slack: constants, far offsets, tiny and huge spans, steps that are bfloat16 numbers."""
    matrix = torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    matrix[0:16] = 1.001
    matrix[16:32] += 3000
    matrix[32:48] *= 1e-30
    matrix[48:64] *= 1e4 if dtype is torch.float16 else 1e30
    steps = torch.randint(128, 256, (448, 1)) * 2.0 ** torch.randint(-9, 0, (448, 1))
    matrix[64:] = torch.rand(448, COLUMNS, dtype=torch.float64) * steps
    matrix[64:, 0], matrix[64:, 1:40] = 0, 15 * steps
    return matrix.to(dtype)


def both_ways(codec: StochasticRounding, matrix: torch.Tensor):
    """Return kept tensors and decoded matrices, unfused and fused, of the same draws."""
    results = []
    for fused in (False, True):
        one = StochasticRounding(codec.bits, codec.group, fused)
        torch.manual_seed(1)
        kept = one.store(Operands(Moment.STORED, DenseMatrix(matrix)))
        results.append((kept, one.restore(kept, *matrix.shape, matrix.dtype).dense()))
    assert not fusing.why_unfused()
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        (4, torch.float32),
        (4, torch.bfloat16),
        (4, torch.float16),
        (4, torch.float64),
        (8, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("dither", [None, LAST_DITHER])
def test_fused_codes_are_those_of_one_operation_after_the_other(bits, dtype, dither, monkeypatch):
    """Scales to the bit; an entry moves by at most a step, and differs only where a last bit decides."""
    matrix = hard_values(dtype)
    if dither is not None:
        feed(monkeypatch, torch.full((ROWS,), dither).numpy())
    (kept, plain), (fused_kept, fused) = both_ways(StochasticRounding(bits), matrix)
    assert torch.equal(kept[1], fused_kept[1])
    step = kept[1][:, 1:].double()
    # Half a unit of the last place for what the result is rounded to.
    slack = torch.finfo(dtype).eps * matrix.double().abs()
    assert ((fused.double() - matrix.double()).abs() <= step * (1 + 1e-4) + slack).all()
    differs = ~torch.isclose(plain.double(), fused.double(), rtol=1e-5, atol=0) & (step > 1e-35)
    assert differs.double().mean() <= (0.02 if dither is not None else 0.002)


@pytest.mark.slow
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_its_group_and_nowhere_else(value):
    matrix = torch.randn(ROWS, 128)
    clean = both_ways(StochasticRounding(4), matrix)[1][1]
    matrix[1, 70] = value
    (_, plain), (_, fused) = both_ways(StochasticRounding(4), matrix)
    assert not fused[1, 70].isfinite()
    assert torch.equal(plain.isfinite(), fused.isfinite())
    fused[1, 64:], clean[1, 64:] = 0, 0
    assert torch.equal(fused, clean)


def find_bias(draw: Callable[[], torch.Tensor], truth: torch.Tensor, step: torch.Tensor, up: torch.Tensor) -> str:
    """Return what is wrong with rounded values, or an empty string.

    Every draw of every entry lies within a step of the truth. Every entry's mean over draws is the truth: errors lie in
    an interval of a step, so by Hoeffding's bound the mean of 100 is within 0.36 steps at a family level of 1e-6. Sums
    of all rows of a feature, whose dithers are independent, have the variance of the law.

    Args:
        draw: gives fresh values.
        truth: what they stand for.
        step: the grid's, per entry.
        up: the chance of being rounded up, per entry.
    """
    total = torch.zeros_like(truth)
    for _ in range(DRAWS):
        error = (draw().double() - truth) / step
        if not (error.abs() <= 1 + 1e-4).all():
            return f"an entry is off by {float(error.abs().max()):.2f} steps"
        total += error
    if float(total.abs().max()) > 0.36 * DRAWS:
        return f"an entry's mean is off by {float(total.abs().max()) / DRAWS:.2f} steps"
    z_scores = total.sum(0) / (DRAWS * (up * (1 - up)).sum(0)).sqrt()
    largest = float(z_scores.abs().max())
    return f"a feature's mean is off by {largest:.1f} standard errors" if largest > LARGEST_Z else ""


def bias_of_codes(bits: int) -> str:
    matrix = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    codec = StochasticRounding(bits, fused=True)
    step, up = rounding_steps(matrix.double(), codec)

    def draw() -> torch.Tensor:
        return codec.restore(
            codec.store(Operands(Moment.STORED, DenseMatrix(matrix))), ROWS, COLUMNS, torch.float32
        ).dense()

    return find_bias(draw, matrix.double(), step, up)


def bias_of_slopes(bits: int) -> str:
    x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) * 2
    activation, codec = Activation("gelu"), StochasticRounding(bits, fused=True)
    truth, grid = activation.derivative(x.double(), x.double()), activation.codec(bits).grid
    place = (truth - grid.low) / grid.step

    def draw() -> torch.Tensor:
        return apply_derivative(store_derivative(x, x, activation, codec), torch.ones_like(x))

    return find_bias(draw, truth, torch.full_like(truth, grid.step), place - place.floor())


def rounds_to_nearest(groups, draws, shifts, *, bits):
    return encode_groups(groups, torch.full_like(draws, 0.5), torch.zeros_like(shifts), bits=bits)


def dithers_too_little(groups, draws, shifts, *, bits):
    return encode_groups(groups, (draws + shifts).frac() * 0.95, torch.zeros_like(shifts), bits=bits)


def steps_too_far(packed, scales, *, bits, dtype):
    return decode_groups(packed, scales * torch.tensor([1, 1.02]), bits=bits, dtype=dtype)


_encode_slope = stored_derivative._encode_slope


def dithers_slopes_too_little(source, draws, shifts, **options):
    return _encode_slope(source, (draws + shifts).frac() * 0.95, torch.zeros_like(shifts), **options)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4])
def test_fused_codes_are_unbiased_entry_by_entry(bits):
    assert bias_of_codes(bits) == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "twin", "found"),
    [
        ("encode_groups", rounds_to_nearest, "an entry's mean is off"),
        ("encode_groups", dithers_too_little, "a feature's mean is off"),
        ("decode_groups", steps_too_far, "off"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_fused_codec_that_is_biased_is_caught(place, twin, found, monkeypatch):
    """Compiled like the real one, and seen by the very test that the real one passes."""
    monkeypatch.setattr(stochastic_rounding, place, twin)
    assert found in bias_of_codes(4)
    assert any(version.function is twin for version in fusing._versions._compiled)


@pytest.mark.slow
def test_fused_slopes_are_unbiased_entry_by_entry_and_a_biased_twin_is_caught(monkeypatch):
    assert bias_of_slopes(2) == ""
    monkeypatch.setattr(stored_derivative, "_encode_slope", dithers_slopes_too_little)
    assert "a feature's mean is off" in bias_of_slopes(2)
    assert any(version.function is dithers_slopes_too_little for version in fusing._versions._compiled)


def outputs_and_gradients(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(3)
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    return output.detach(), torch.autograd.grad(output, leaf, x)[0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_outputs_are_the_exact_models_bit_for_bit(dtype):
    """Compiled, a dropout's factor would be rounded later than PyTorch rounds it. Its gradient is exact as well."""
    # The dropout first, for what codecs draw comes from the same stream.
    exact = nn.Sequential(nn.Dropout(0.3), nn.Linear(128, 128), nn.ReLU()).to(dtype)
    converted = copy.deepcopy(exact)
    cheapgrad.approximate(converted, recipes.memory(4, fused=True), skip_small=False)
    x = torch.randn(256, 128).to(dtype)
    assert torch.equal(outputs_and_gradients(exact, x)[0], outputs_and_gradients(converted, x)[0])
    for ours, theirs in zip(outputs_and_gradients(converted[0], x), outputs_and_gradients(exact[0], x), strict=True):
        assert torch.equal(ours, theirs)
    assert "_scale_kept" in {version.function.__name__ for version in fusing._versions._compiled}


@pytest.mark.slow
def test_a_group_that_no_scale_covers_shows_when_fused_too():
    matrix = torch.randn(ROWS, COLUMNS)
    matrix[3] = torch.linspace(-2e38, 2e38, COLUMNS)
    (_, plain), (_, fused) = both_ways(StochasticRounding(4), matrix)
    assert not fused[3].isfinite().any()
    assert torch.equal(plain.isfinite(), fused.isfinite())


@pytest.mark.slow
def test_a_fused_model_has_the_gradients_of_an_unfused_one():
    """A transformer block with dropout; convolutions, batch norm and ReLU in place: the same up to last bits."""
    block = nn.TransformerEncoderLayer(64, 1, 256, activation="gelu", batch_first=True, dropout=0.1)
    images = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1))
    for model, x in ((block, torch.randn(16, 32, 64)), (images, torch.randn(8, 8, 16, 16))):
        gradients = []
        for fused in (False, True):
            converted = copy.deepcopy(model)
            cheapgrad.approximate(converted, recipes.memory(4, fused=fused), skip_small=False)
            for _ in range(2):
                converted.zero_grad()
                torch.manual_seed(2)
                converted(x).square().mean().backward()
            gradients.append([parameter.grad for parameter in converted.parameters()])
        assert not fusing.why_unfused()
        for one, other in zip(*gradients, strict=True):
            assert (one - other).norm() <= 1e-3 * one.norm() + 1e-7
