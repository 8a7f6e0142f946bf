"""PReLU: forward and dx bit for bit, an unbiased gradient of the slopes with the stated variance."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from cheapgrad import Rule, approximate
from cheapgrad.cost import measure_held_bytes
from cheapgrad.errors import ForwardModeError, SecondDerivativeError
from cheapgrad.ops.prelu import prelu_variance, sketched_prelu
from cheapgrad.sketch import DenseMatrix, Moment, Operands, StochasticRounding, random
from tests.oracles import rounding

SHAPES = [(1, (7,)), (1, (3, 64)), (5, (3, 5)), (3, (2, 3, 17)), (3, (2, 3, 5, 7)), (1, (2, 3, 2, 2, 3))]


def run(module, x, cotangent):
    leaf = x.clone().requires_grad_()
    output = module(leaf)
    return output.detach(), *torch.autograd.grad(output, [leaf, module.weight], cotangent)


@pytest.mark.parametrize(("slopes", "shape"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_forward_dx_and_bytes(slopes, shape, dtype):
    stock = nn.PReLU(slopes).to(dtype)
    converted = copy.deepcopy(stock)
    handle = approximate(converted, Rule(stored=StochasticRounding(4)))
    x, cotangent = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
    x.view(-1)[[0, 1]] = 0.0
    (output, of_input, _), (expected, exact, _) = run(converted, x, cotangent), run(stock, x, cotangent)
    assert torch.equal(output, expected)
    assert torch.equal(of_input, exact)
    held = [
        measure_held_bytes(lambda model=model: model(x.requires_grad_()), exclude=[model]).total_bytes
        for model in (stock, converted)
    ]
    assert [handle.rows[0].exact_saved_bytes, handle.rows[0].saved_bytes] == held


def outcomes_of(matrix, codec):
    """Return draws that lead to every outcome of the code of a matrix whose rows have a draw each, and the chances."""
    scales = codec.store(Operands(Moment.STORED, DenseMatrix(matrix)))[1].double()
    low, step = (scale.repeat_interleave(codec.group)[: matrix.numel()].view(matrix.shape) for scale in scales.T)
    _, _, up = rounding.lower_upper_chance(matrix.numpy(), low.numpy(), step.numpy())
    shifts = np.array(rounding.mirrored_digits(matrix.shape[1]))
    combined = list(itertools.product(*[rounding.outcomes_of_a_draw(row, shifts) for row in up]))
    return [[m for m, _, _ in each] for each in combined], np.array([np.prod([c for _, c, _ in e]) for e in combined])


def enumerate_slopes(slopes, shape, bits, monkeypatch, spoil=lambda negative: negative):
    codec = StochasticRounding(bits, group=8)
    x, cotangent = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    weight = torch.rand(slopes, dtype=torch.float64, requires_grad=True)
    draws, chances = outcomes_of(x.clamp(max=0).reshape(-1, shape[-1]), codec)
    drawn = []
    for each in draws:
        numbers = torch.tensor(spoil(each), dtype=torch.float32)
        monkeypatch.setattr(
            random, "uniform", lambda like, asked, numbers=numbers, **options: numbers.reshape(tuple(asked))
        )
        drawn.append(torch.autograd.grad(sketched_prelu(x, weight, codec), weight, cotangent)[0].numpy())
    exact = torch.autograd.grad(nn.functional.prelu(x, weight), weight, cotangent)[0].numpy()
    return chances, np.stack(drawn) - exact, prelu_variance(x, weight, cotangent, codec)


def assert_law(chances, errors, variance):
    assert chances.sum() == pytest.approx(1, rel=1e-9)
    np.testing.assert_allclose(chances @ errors, 0, atol=3e-6, err_msg="biased")
    np.testing.assert_allclose(chances @ (errors**2).sum(1), float(variance.weight), rtol=1e-4, err_msg="variance")
    assert float(variance.weight) > 1e-4
    assert float(variance.input) == 0


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("slopes", "shape"), [(1, (3, 4)), (2, (1, 2, 5)), (3, (4, 3))])
def test_every_outcome_makes_up_the_slopes_gradient_and_the_stated_variance(slopes, shape, bits, monkeypatch):
    assert_law(*enumerate_slopes(slopes, shape, bits, monkeypatch))


def test_rounding_down_is_caught(monkeypatch):
    with pytest.raises(AssertionError, match="biased"):
        assert_law(*enumerate_slopes(1, (3, 4), 2, monkeypatch, spoil=lambda each: [0.9 * number for number in each]))


def test_frozen_slopes_keep_bits_only():
    module, x = nn.PReLU(3), torch.randn(2, 3, 4, 4, requires_grad=True)
    approximate(module, Rule(stored=StochasticRounding(4)))
    module.weight.requires_grad_(False)
    assert measure_held_bytes(lambda: module(x), exclude=[module]).total_bytes == 2 * 3 * 16 / 8


def test_a_nan_reaches_both_gradients():
    module, x = nn.PReLU(), torch.randn(4, 64)
    approximate(module, Rule(stored=StochasticRounding(4)))
    x[1, 2] = torch.nan
    output, of_input, of_slope = run(module, x, torch.ones(4, 64))
    assert output[1, 2].isnan()
    assert of_slope.isnan().all()
    assert of_input.isfinite().all(), "as PyTorch: the slope is that of the negative side"


def test_what_is_refused():
    module, x = nn.PReLU(), torch.randn(4, 8, requires_grad=True)
    approximate(module, Rule(stored=StochasticRounding(4)))
    (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(SecondDerivativeError, match=r"through a sketched activation \(prelu\)"):
        first.sum().backward()
    with forward_ad.dual_level(), pytest.raises(ForwardModeError, match=r"asked of a sketched activation \(prelu\)"):
        module(forward_ad.make_dual(x, torch.ones_like(x)))
