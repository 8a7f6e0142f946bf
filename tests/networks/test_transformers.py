"""Blocks of transformers, converted whole: same values, unbiased gradients, and a fraction of the bytes held."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import cheapgrad
from cheapgrad import Rule, approximate, audit
from cheapgrad.auditing import measure_gradient_moments
from cheapgrad.cost import measure_held_bytes
from cheapgrad.sketch import RowSample, StochasticRounding
from tests.networks import blocks
from tests.networks.twins import leave_weights_out
from tests.ops.chains.networks import choose_all_rows

WIDTH, HEADS, BATCH, LENGTH = 128, 2, 4, 32
MEMORY = Rule("*", stored=StochasticRounding(4), recompute=True)
BOTH = Rule("*", stored=StochasticRounding(4), cotangent=RowSample(0.5), recompute=True)
SPEED = Rule("*", cotangent=RowSample(0.5))


class Function(nn.Module):
    """SiLU called as a function."""

    def forward(self, x):
        return functional.silu(x)


def encoder(**options):
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, **options)


#: Block, and how many times fewer bytes its conversion for memory holds at least.
BLOCKS = {
    "encoder, relu": (encoder, 3.4),
    "encoder, gelu": (lambda: encoder(activation="gelu"), 4.0),
    "encoder, norms first": (lambda: encoder(activation="gelu", norm_first=True), 4.0),
    "bert": (lambda: blocks.BertBlock(WIDTH, HEADS), 4.0),
    "bert, step by step": (lambda: blocks.BertBlock(WIDTH, HEADS, "eager"), 2.0),
    "gpt": (lambda: blocks.GptBlock(WIDTH, HEADS), 4.0),
    "gpt, tanh": (lambda: blocks.GptBlock(WIDTH, HEADS, activation=lambda: nn.GELU("tanh")), 4.0),
    "llama": (lambda: blocks.LlamaBlock(WIDTH, HEADS), 4.0),
    "llama, own norm": (lambda: blocks.LlamaBlock(WIDTH, HEADS, norm=blocks.RMSNorm), 4.0),
    "llama, function": (lambda: blocks.LlamaBlock(WIDTH, HEADS, activation=Function), 4.0),
}


def stack(make, count=3):
    torch.manual_seed(0)
    return nn.Sequential(*[make() for _ in range(count)])


def tokens(**options):
    return torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1), **options)


def gradients(model, x):
    model.zero_grad()
    output = model(x)
    output.backward(torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(2)))
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def held(model, x):
    # What is kept anyway shows in the first step.
    gradients(model, x)
    return measure_held_bytes(lambda: model(x), exclude=[model]).total_bytes


@pytest.mark.parametrize("rule", [MEMORY, BOTH, SPEED], ids=["memory", "both", "speed"])
@pytest.mark.parametrize("name", BLOCKS)
def test_values_are_bit_identical_in_training_and_evaluation(name, rule):
    model = stack(BLOCKS[name][0], 2)
    ours, x = copy.deepcopy(model), tokens()
    approximate(ours, rule, skip_small=False)
    for _ in range(2):
        assert torch.equal(ours(x), model(x))
        gradients(ours, x)
    with torch.no_grad():
        assert torch.equal(ours.eval()(x), model.eval()(x))


@pytest.mark.parametrize("rule", [MEMORY, BOTH], ids=["memory", "both"])
@pytest.mark.parametrize("name", BLOCKS)
def test_held_bytes(name, rule):
    make, factor = BLOCKS[name]
    model, x = stack(make), tokens(requires_grad=True)
    exact = held(model, x)
    approximate(model, rule, skip_small=False)
    assert exact / held(model, x) >= factor


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_are_exact_where_all_rows_are_kept(name, monkeypatch):
    choose_all_rows(monkeypatch)
    model = stack(BLOCKS[name][0], 1).double()
    # Half precision in Llama's own norm would hide a difference.
    ours, x = copy.deepcopy(model), tokens(dtype=torch.float64)
    approximate(ours, Rule("*", cotangent=RowSample(0.5), recompute=True), skip_small=False)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if "own norm" in name else {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(gradients(ours, x), gradients(model, x), **tolerance)


@pytest.mark.parametrize("is_twin", [False, True], ids=["weighted", "weights left out"])
@pytest.mark.parametrize("name", ["encoder, norms first", "bert", "gpt", "llama"])
def test_gradients_are_unbiased(name, is_twin, monkeypatch):
    model, x = stack(BLOCKS[name][0], 1), tokens()[:2, :16]
    # One cotangent for all tokens: a gradient that they agree on shows its bias in few draws.
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))

    def draw():
        return torch.autograd.grad((model(x) @ direction).sum(), list(model.parameters()))

    exact = draw()
    approximate(model, BOTH, skip_small=False)
    if is_twin:
        leave_weights_out(monkeypatch)
    moments = measure_gradient_moments(draw, exact, draws=64)
    assert moments.unbiased != is_twin
    assert moments.detectable_relative_bias < 0.1, "too few draws to tell"


def test_what_still_holds_the_bytes_is_listed():
    model, x = stack(BLOCKS["bert, step by step"][0], 1), tokens()
    approximate(model, MEMORY, skip_small=False)
    gradients(model, x)
    report = cheapgrad.scan(model, x)
    most = max(report.operations, key=lambda operation: operation.saved_bytes)
    # Attention that is written out in the block's own forward holds copies of its queries, keys and values.
    assert (most.module, most.operation) == ("0", "aten::bmm")
    assert most.saved_bytes == 3 * BATCH * LENGTH * WIDTH * 4


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_functions_before_a_dropout_are_reached(activation):
    torch.manual_seed(0)
    model, x = encoder(activation=activation).double(), tokens(dtype=torch.float64)[:4, :16]
    # Of the feed-forward, between the activation and the second linear map.
    model.dropout.p = 0.2
    handle = approximate(model, Rule("*", stored=StochasticRounding(2), recompute=True), skip_small=False)
    assert not [held for held in handle.uncovered(x) if activation in held.operation]
    report = audit(model, lambda model, x: model(x).pow(3).mean(), x, draws=128, seed=0)
    assert report.unbiased
    assert report.relative_variance > 0
