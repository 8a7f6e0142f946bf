"""Dropout from bits: PyTorch's own masks and stream of random numbers, exact gradients, a bit per entry."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from cheapgrad import Rule, approximate
from cheapgrad.cost import measure_held_bytes
from cheapgrad.errors import ForwardModeError, NoEffectWarning, SecondDerivativeError
from cheapgrad.ops import dropout
from cheapgrad.ops.dropout import Dropping
from cheapgrad.sketch import LowRank, RowSample, StochasticRounding
from tests.devices import DEVICES
from tests.ops.chains.small_networks import links

RULE = Rule(stored=StochasticRounding(4))
SHAPES = [(7,), (5, 64), (2, 3, 17), (2, 3, 4, 5)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def pair(stock):
    converted = copy.deepcopy(stock)
    return stock, converted, approximate(converted, RULE)


def run(module, x, cotangent, seed=3):
    """Return output, gradient, and the number that PyTorch draws next."""
    leaf = x.clone().requires_grad_()
    torch.manual_seed(seed)
    output = module(leaf)
    following = torch.rand((), device=x.device)
    return output.detach(), torch.autograd.grad(output, leaf, cotangent)[0], following


@pytest.mark.parametrize("build", [nn.Dropout, nn.AlphaDropout], ids=lambda build: build.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_output_gradient_and_stream_are_pytorchs(build, dtype, device, p):
    stock, converted, _ = pair(build(p))
    for shape in SHAPES:
        x, cotangent = (torch.randn(shape, dtype=torch.float64).to(device, dtype) for _ in range(2))
        x.view(-1)[0] = torch.nan
        for ours, expected in zip(run(converted, x, cotangent), run(stock, x, cotangent), strict=True):
            assert torch.equal(ours.nan_to_num(99.0), expected.nan_to_num(99.0))


def test_a_strided_input_has_the_same_mask():
    stock, converted, _ = pair(nn.Dropout(0.4))
    x, cotangent = torch.randn(9, 6).t(), torch.randn(6, 9)
    for ours, expected in zip(run(converted, x, cotangent), run(stock, x, cotangent), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("build", [nn.Dropout, nn.AlphaDropout], ids=lambda build: build.__name__)
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_without_a_mask_stock_code_runs(build, p):
    stock, converted, _ = pair(build(0.5))
    stock.p = converted.p = p
    x, cotangent = torch.randn(4, 8), torch.randn(4, 8)
    for ours, expected in zip(run(converted, x, cotangent), run(stock, x, cotangent), strict=True):
        assert torch.equal(ours, expected)
    with pytest.warns(NoEffectWarning, match=rf"no mask is held for a chance of {p:g}"):
        approximate(build(p), RULE)


def test_where_no_gradient_is_needed_the_stream_is_pytorchs_too():
    stock, converted, _ = pair(nn.Dropout(0.4))
    x = torch.randn(4, 9)
    for grad_enabled in (True, False):
        results = []
        for module in (stock, converted):
            torch.manual_seed(1)
            with torch.set_grad_enabled(grad_enabled):
                results.append((module(x), torch.rand(())))
        assert torch.equal(results[0][0], results[1][0])
        assert results[0][1] == results[1][1]
    assert torch.equal(converted.eval()(x), x)


@pytest.mark.parametrize("build", [nn.Dropout, nn.AlphaDropout], ids=lambda build: build.__name__)
@pytest.mark.parametrize("shape", [(16, 64), (3, 5, 30)])
def test_bytes_held_are_those_predicted(build, shape):
    stock, converted, handle = pair(build(0.3))
    x = torch.randn(shape, requires_grad=True)
    exact, ours = (measure_held_bytes(lambda model=model: model(x)).total_bytes for model in (stock, converted))
    (row,) = handle.rows
    assert (row.exact_saved_bytes, row.saved_bytes) == (exact, ours)
    assert ours == math.prod(shape[:-1]) * math.ceil(shape[-1] / 8)


def block(width=64, p=0.3):
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(p), nn.Linear(2 * width, width)
    ).double()


def gradients(model, x, cotangent, seed):
    torch.manual_seed(seed)
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(model(leaf), [leaf, *model.parameters()], cotangent)


def test_a_dropout_does_not_end_a_chain():
    """Only kept rows get a gradient, all the way down: rows were drawn once."""
    model, x = block(), torch.randn(40, 64, dtype=torch.float64)
    approximate(model, Rule(cotangent=RowSample(0.25)), skip_small=False)
    of_input = gradients(model, x, torch.randn(40, 64, dtype=torch.float64), 0)[0]
    assert (of_input.abs().sum(1) > 0).sum() == 10


def test_a_chain_holds_the_mask_in_bits_and_nothing_of_the_dropouts_input():
    model, x = block().float(), torch.randn(40, 64)
    handle = approximate(model, Rule(stored=StochasticRounding(4), cotangent=RowSample(0.5)), skip_small=False)
    held = measure_held_bytes(lambda: model(x), exclude=[model, x]).total_bytes
    assert handle.rows[3].saved_bytes == 40 * 128 / 8
    # The first linear layer reads the first code of the norm, whose input needs no gradient but whose codes are two.
    assert held == sum(handle.rows[position].saved_bytes or 0 for position in (0, 2, 3, 4))


RULES = {
    "rows": Rule(cotangent=RowSample(0.5)),
    "codes": Rule(stored=StochasticRounding(4)),
    "both": Rule(stored=StochasticRounding(4), cotangent=RowSample(0.5)),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_chain_with_dropout_is_unbiased_given_its_mask(rule, monkeypatch):
    """The mask is held fixed: the mean over draws is the gradient of the network with that very mask."""
    model, x = block(16), torch.randn(12, 16, dtype=torch.float64)
    cotangent = torch.randn(12, 16, dtype=torch.float64)
    kept = (torch.rand(12, 32) < 0.7).double()
    leaf = x.clone().requires_grad_()
    hidden = model[2](model[1](model[0](leaf))) * kept / 0.7
    exact = torch.autograd.grad(model[4](hidden), [leaf, *model.parameters()], cotangent)
    packed = dropout.pack_bits(kept.to(torch.uint8), 1)
    monkeypatch.setattr(Dropping, "draw", lambda self, x: packed)
    approximate(model, rule, skip_small=False)
    drawn = [gradients(model, x, cotangent, seed) for seed in range(300)]
    for position, truth in enumerate(exact):
        stacked = torch.stack([each[position] for each in drawn]).flatten(1)
        error = stacked - truth.flatten()
        direction = torch.randn(error.shape[1], 16, dtype=torch.float64)
        projected = error @ direction
        standard_error = projected.std(0) / len(drawn) ** 0.5
        assert (projected.mean(0).abs() <= 5.5 * standard_error + 1e-12).all()
        assert standard_error.norm() / 16**0.5 < 0.1 * (truth.norm() + 1e-12)


def test_another_mask_in_backward_is_caught(monkeypatch):
    scale = Dropping.scale
    monkeypatch.setattr(Dropping, "scale", lambda self, grad, packed: scale(self, grad, packed.flip(0)))
    stock, converted, _ = pair(nn.Dropout(0.5))
    x, cotangent = torch.randn(8, 64), torch.randn(8, 64)
    ours, expected = run(converted, x, cotangent), run(stock, x, cotangent)
    assert not torch.equal(ours[1], expected[1])


@pytest.mark.parametrize("stock", [nn.Dropout, nn.AlphaDropout])
def test_one_in_place_is_refused_and_ends_a_chain(stock):
    found = []
    for inplace in (False, True):
        model = nn.Sequential(nn.Linear(8, 8), stock(0.5, inplace=inplace), nn.Linear(8, 8))
        handle = approximate(model, Rule(cotangent=RowSample(0.5), stored=StochasticRounding(4)), skip_small=False)
        found.append((handle.rows[1].remark, links(model(torch.randn(4, 8)))))
    reason = f"unsupported: it overwrites its input, and chains end at it; {stock.__name__}(inplace=False) is reached"
    assert found[1] == (reason, 1)
    # Out of place the mask of a Dropout joins the chain; an AlphaDropout is no stage of one.
    assert found[0][1] == (3 if stock is nn.Dropout else 1)


def test_what_is_refused():
    for rule, text in (
        (Rule(stored=LowRank(2)), "stored: LowRank has no meaning for Dropout"),
        (Rule(stored=RowSample(0.5)), "stored: RowSample has no meaning for Dropout"),
    ):
        with pytest.warns(NoEffectWarning, match=text):
            approximate(nn.Sequential(nn.Dropout(0.5)), rule)
    _, model, handle = pair(nn.Dropout(0.5))
    x = torch.randn(4, 8, requires_grad=True)
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(SecondDerivativeError, match="through a sketched dropout"):
        first.sum().backward()
    with forward_ad.dual_level(), pytest.raises(ForwardModeError, match="asked of a sketched dropout"):
        model(forward_ad.make_dual(x, torch.ones_like(x)))
    with handle.exact():
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        first.sum().backward()
