"""Activations that overwrite their input: PyTorch's values and gradients, in bits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from cheapgrad import Rule, approximate
from cheapgrad.cost import measure_held_bytes
from cheapgrad.errors import SecondDerivativeError
from cheapgrad.sketch import StochasticRounding

EIGHT_BITS = StochasticRounding(8)
PIECEWISE_LINEAR = [nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh]


def network(activation):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation, nn.Conv2d(8, 4, 3))


def gradients(model, x):
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    output.square().sum().backward()
    return [output.detach(), leaf.grad, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("activation", PIECEWISE_LINEAR)
def test_a_branch_in_one_bit_is_exact(activation):
    stock = network(activation(inplace=True))
    model, x = copy.deepcopy(stock), torch.randn(2, 3, 12, 12)
    handle = approximate(model, Rule("2", stored=EIGHT_BITS))
    assert handle.rows[0].status == "converted"
    for mine, theirs in zip(gradients(model, x), gradients(stock, x), strict=True):
        assert torch.equal(mine, theirs)


def test_only_bits_are_held():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True)), torch.randn(2, 3, 18, 18)
    before = measure_held_bytes(lambda: model(x).sum(), exclude=[model, x]).total_bytes
    approximate(model, Rule("1", stored=EIGHT_BITS))
    after = measure_held_bytes(lambda: model(x).sum(), exclude=[model, x]).total_bytes
    assert (before, after) == (2 * 8 * 16 * 16 * 4, 2 * 8 * 16 * 16 // 8)


def test_the_input_is_overwritten():
    model = nn.Sequential(nn.ReLU(inplace=True))
    approximate(model, Rule("*", stored=EIGHT_BITS))
    x = torch.randn(4, 8, requires_grad=True) * 1
    y = model(x)
    assert y is x or y.data_ptr() == x.data_ptr()
    assert (x >= 0).all()


def test_a_smooth_one_is_unbiased():
    torch.manual_seed(0)
    x = torch.randn(64, dtype=torch.float64)
    model = nn.Sequential(nn.SiLU(inplace=True))
    approximate(model, Rule("*", stored=StochasticRounding(2)))

    def slope():
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(model(leaf * 1).sum(), leaf)[0]

    draws = torch.stack([slope() for _ in range(4000)])
    leaf = x.clone().requires_grad_()
    exact = torch.autograd.grad(nn.functional.silu(leaf).sum(), leaf)[0]
    z_scores = (draws.mean(0) - exact) / (draws.std(0) / 4000**0.5).clamp(min=1e-12)
    assert z_scores.abs().max() < 4.5
    # A slope wrong by a tenth of a step would be seen.
    assert ((draws.std(0) / 4000**0.5).max() * 4.5) < 0.05


@pytest.mark.parametrize("where", ["leaf", "view"])
def test_what_cannot_be_overwritten_runs_stock_code(where):
    model = nn.Sequential(nn.ReLU(inplace=True))
    approximate(model, Rule("*", stored=EIGHT_BITS))
    x = torch.randn(4, 8, requires_grad=True)
    if where == "leaf":
        with pytest.raises(RuntimeError, match="leaf"):
            model(x)
    else:
        model((x * 1)[:2]).sum().backward()
        assert torch.equal(x.grad, torch.where((x > 0) & (torch.arange(4) < 2).unsqueeze(1), 1.0, 0.0))


def test_second_derivatives_are_refused():
    model = nn.Sequential(nn.ReLU(inplace=True))
    approximate(model, Rule("*", stored=EIGHT_BITS))
    x = torch.randn(4, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x * x).square().sum(), x, create_graph=True)
    with pytest.raises(SecondDerivativeError):
        gradient.sum().backward()


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_graphs_anchor_what_is_drawn(inplace):
    """One anchor for one draw in the forward graph: without it a compiler may draw again in the backward graph."""
    graphs = []

    def read(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 64), nn.SiLU(inplace=inplace))
    approximate(model, Rule("1", stored=StochasticRounding(4)), skip_small=False)
    torch.compile(model, backend=aot_autograd(fw_compiler=read), fullgraph=True)(torch.randn(4, 8))
    assert [graph.count("cheapgrad.uniform") for graph in graphs] == [1]
    assert [graph.count("cheapgrad.anchor") for graph in graphs] == [1]
