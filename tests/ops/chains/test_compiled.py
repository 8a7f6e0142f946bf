"""Compiled graphs have the same chains as eager mode: what they hold, what they draw, and whom they pass over."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.networks import Bottleneck, Encoder, LanguageModel, loss_of
from benchmarks.vision_transformer import VisionTransformer
from cheapgrad import Rule, approximate, recipes
from cheapgrad.cost import measure_held_bytes
from cheapgrad.ops.chains.operator import plan_text
from cheapgrad.sketch import RowSample, StochasticRounding, random
from tests.ops.chains.networks import convert
from tests.ops.chains.small_networks import NAMES, WIDTH, Network, Shared, every_activation, gradients, pair, shared


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()


def compiled(function, backend="aot_eager", **options):
    """Compile as one graph."""
    return torch.compile(function, backend=backend, fullgraph=True, **options)


MEMORY, BOTH = recipes.memory(bits=4), recipes.both(bits=4, keep=0.5)
#: Each once, since compiling takes seconds: with rows drawn there are codes, too.
NETWORKS = {
    "vision transformer": (
        lambda: VisionTransformer(128, 2, tokens=16, patch=12),
        lambda: (torch.randn(8, 16, 12), torch.randint(0, 10, (8,))),
        BOTH,
    ),
    "encoder": (
        lambda: Encoder(128, 2, 50, 16, dropout=0.1),
        lambda: (torch.randint(0, 50, (8, 16)), torch.randint(0, 2, (8,))),
        BOTH,
    ),
    "language model": (
        lambda: LanguageModel(128, 2, 50, 16),
        lambda: (torch.randint(0, 50, (8, 16)), torch.randint(0, 50, (8, 16))),
        MEMORY,
    ),
    "convolutions": (
        lambda: nn.Sequential(Bottleneck(32, 8, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
        lambda: (torch.randn(8, 32, 16, 16), torch.randint(0, 10, (8,))),
        BOTH,
    ),
}


def held_and_gradients(model, runner, batch):
    # The second step is like all that follow.
    loss_of(runner, *batch).backward()
    held = measure_held_bytes(lambda: loss_of(runner, *batch), exclude=[model, *batch]).total_bytes
    model.zero_grad()
    loss_of(runner, *batch).backward()
    return held, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("network", NETWORKS)
def test_whole_networks_hold_what_they_hold_in_eager_mode(network):
    make, make_batch, recipe = NETWORKS[network]
    torch.manual_seed(3)
    stock, batch = make(), make_batch()
    exact_bytes, exact = held_and_gradients(stock, stock, batch)
    eager, traced = copy.deepcopy(stock), copy.deepcopy(stock)
    for model in (eager, traced):
        approximate(model, recipe, skip_small=False)
    eager_bytes, of_eager = held_and_gradients(eager, eager, batch)
    # With the decompositions and the partitioner of the default backend, without its code generation.
    function = compiled(traced, backend="aot_eager_decomp_partition")
    traced_bytes, of_traced = held_and_gradients(traced, function, batch)
    # The encoder's norms hold their input for attention and codes for the sum behind it.
    assert traced_bytes <= 1.2 * eager_bytes, (traced_bytes, eager_bytes)
    assert traced_bytes < 0.5 * exact_bytes
    assert (of_traced - exact).norm() < 2 * (of_eager - exact).norm()


def test_one_draw_of_rows_serves_the_whole_chain():
    model = nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))
    convert(model)
    function = compiled(model)
    seen = set()
    for _ in range(10):
        model.zero_grad()
        x = torch.randn(WIDTH, WIDTH, requires_grad=True)
        function(x).backward(torch.diag(torch.arange(1.0, WIDTH + 1)))
        kept = x.grad.abs().sum(1) > 0
        # The cotangent is diagonal: row n of dW comes from row n alone.
        assert torch.equal(kept, model[2].weight.grad.abs().sum(1) > 0)
        assert int(kept.sum()) == WIDTH // 2
        seen.add(tuple(kept.tolist()))
    assert len(seen) > 1, "every step used the same draw"


def z_score_of_the_norm():
    """Return by how many standard errors the mean gradient is off, where one code used twice would bias it."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16, bias=False)).double()
    x, cotangent = torch.randn(64, 16).double().requires_grad_(), torch.randn(64, 16).double()
    (exact,) = torch.autograd.grad(model(x), x, cotangent)
    # dx has the term -x_hat mean(g x_hat): a common error of both factors shows along -g.
    direction = cotangent @ model[1].weight.detach()
    convert(model, None, stored=StochasticRounding(2, group=16))
    function = compiled(model)
    errors = []
    for _ in range(400):
        (found,) = torch.autograd.grad(function(x), x, cotangent)
        errors.append(((found - exact) * direction).sum())
    errors = torch.stack(errors)
    return float(errors.mean() / (errors.std() / len(errors) ** 0.5))


def test_two_codes_of_a_norm_are_independent_and_its_gradient_unbiased():
    assert abs(z_score_of_the_norm()) < 5


def test_codes_that_the_compiler_merges_are_caught(monkeypatch):
    monkeypatch.setattr(random, "_number_of_draw", lambda: 0)
    assert abs(z_score_of_the_norm()) > 15


@every_activation
def test_the_gradients_are_those_of_the_stock_network(activation, full):
    model, stock = pair(activation)
    x = torch.randn(10, WIDTH)
    torch.testing.assert_close(gradients(model, x, run_compiled), gradients(stock, x), rtol=1e-5, atol=1e-5)


def run_compiled(model, x):
    return compiled(model)(x)


@dataclass
class Visit:
    """What somebody does with a tensor between two layers."""

    way: str

    def run(self, network, name, x):
        """Run a network forward; returns everything the loss depends on."""
        kept = []

        def visit(at, tensor):
            if at == name:
                kept.append(tensor)
                if self.way == "overwrite":
                    return tensor.add_(0.5)
                if self.way == "hook":
                    tensor.register_hook(lambda gradient: 2 * gradient)
            return tensor

        network.visit = visit
        output = network(x).square().sum()
        if self.way == "late hook":
            kept[0].register_hook(lambda gradient: 2 * gradient)
        return output + kept[0].pow(3).sum() if self.way == "use" else output


@pytest.mark.parametrize("name", NAMES[:3])
@pytest.mark.parametrize("way", ["overwrite", "hook", "late hook", "use"])
def test_tensors_inside_a_chain_are_seen_and_changed(way, name, full):
    results = []
    model, stock = pair()
    for network in (model, stock):
        torch.manual_seed(2)
        x = torch.randn(10, WIDTH, requires_grad=True)

        def run(x, network=network):
            return Visit(way).run(network, name, x)

        (compiled(run) if network is model else run)(x).backward()
        results.append([x.grad, *(parameter.grad for parameter in network.parameters())])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_tensors_and_modules_used_several_times(full):
    model, stock = shared()
    assert isinstance(stock, Shared)
    x = torch.randn(10, WIDTH)
    torch.testing.assert_close(gradients(model, x, run_compiled), gradients(stock, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", [{}, {"stored": StochasticRounding(8), "recompute": True}], ids=["rows", "codes"])
def test_a_checkpoint_inside_a_graph(rule, full):
    model, stock = pair(**rule)
    x = torch.randn(10, WIDTH)
    run = compiled(lambda x: checkpoint(model, x, use_reentrant=False))
    for found, wanted in zip(gradients(model, x, lambda _, x: run(x)), gradients(stock, x), strict=True):
        assert (found - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("rule", [{}, {"stored": StochasticRounding(8), "recompute": True}], ids=["rows", "codes"])
def test_sizes_may_be_symbols(rule, full):
    model, stock = pair(nn.LeakyReLU(0.3), **rule)
    function = compiled(model, dynamic=True)
    for rows in (10, 14):
        x = torch.randn(rows, WIDTH)
        for found, wanted in zip(gradients(model, x, lambda _, x: function(x)), gradients(stock, x), strict=True):
            assert (found - wanted).norm() < 0.05 * wanted.norm()


class OverwritesBeforeASum(nn.Module):
    """An activation in place whose input is read again behind it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x):
        hidden = self.first(x) * 1.5
        return self.second(self.activation(hidden)) + hidden


def test_an_activation_in_place_overwrites_what_is_read_again():
    stock = OverwritesBeforeASum()
    model, x = copy.deepcopy(stock), torch.randn(10, WIDTH)
    approximate(model, Rule(nn.ReLU, stored=StochasticRounding(4)))
    torch.testing.assert_close(gradients(model, x, run_compiled), gradients(stock, x), rtol=1e-5, atol=1e-5)


def test_a_new_budget_is_followed():
    model, x = Network(), torch.randn(8, WIDTH, requires_grad=True)
    handle = convert(model)
    function = compiled(model)
    for keep, rows in ((0.5, 4), (0.25, 2)):
        handle.replace_strategies({name: RowSample(keep) for name in handle.strategies()})
        x.grad = None
        function(x).sum().backward()
        assert int((x.grad.abs().sum(1) > 0).sum()) == rows


@dataclass(frozen=True, repr=False)
class MyRounding(StochasticRounding):
    """A strategy that has the name of none of ours, with a field that is no plain data."""

    note: object = object()


def test_strategies_that_cannot_be_written_down_run_layer_by_layer():
    assert plan_text(StochasticRounding(4), RowSample(0.5), recompute=True)
    assert not plan_text(MyRounding(8), None, recompute=False)
    model, stock = pair(nn.GELU(), cotangent=None, stored=MyRounding(8))
    x = torch.randn(10, WIDTH)
    for found, wanted in zip(gradients(model, x, run_compiled), gradients(stock, x), strict=True):
        assert (found - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_batches_of_other_sizes_are_compiled_anew(keep):
    torch._dynamo.reset()
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    approximate(model, Rule("*", cotangent=RowSample(keep)), skip_small=False)
    function = torch.compile(model, backend="aot_eager")
    for size in (8, 7, 6):
        x = torch.randn(size, 5, WIDTH, requires_grad=True)
        function(x).sum().backward()
        kept = int((x.grad.flatten(0, 1).abs().sum(1) > 0).sum())
        assert kept == int(keep * size * 5 + 0.5)
