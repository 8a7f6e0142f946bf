"""A small network that lets every tensor be seen, and one whose tensors have several consumers; helpers for both."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from cheapgrad import Rule, approximate
from tests.ops.chains.networks import HALF, convert

WIDTH = 8


class Network(nn.Module):
    """A norm, two linear layers and an activation; `visit` sees every tensor between them and may replace it."""

    def __init__(self, activation=functional.gelu, visit=lambda name, tensor: tensor):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.expand = nn.Linear(WIDTH, 12)
        self.contract = nn.Linear(12, WIDTH)
        self.activation = activation
        self.visit = visit

    def forward(self, x):
        x = self.visit("norm", self.norm(x))
        x = self.visit("expand", self.expand(x))
        x = self.visit("activation", self.activation(x))
        return self.visit("contract", self.contract(x))


ACTIVATIONS = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "module": nn.GELU(),
    "in place": functional.relu_,
    "module in place": nn.ReLU(inplace=True),
    "module whose output is held": nn.ReLU(),
    "smooth module whose output is held": nn.Tanh(),
}
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
NAMES = ("norm", "expand", "activation", "contract")


def pair(activation=functional.gelu, **fields):
    """Return a converted network and its stock copy."""
    stock = Network(copy.deepcopy(activation))
    converted = copy.deepcopy(stock)
    convert(converted, **fields)
    return converted, stock


def gradients(model, x, run=lambda model, x: model(x)):
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    run(model, leaf).square().sum().backward()
    return [leaf.grad, *[parameter.grad for parameter in model.parameters()]]


def assert_same(model, stock, run=lambda model, x: model(x), shape=(10,)):
    x = torch.randn(*shape, WIDTH)
    torch.testing.assert_close(gradients(model, x, run), gradients(stock, x, run), rtol=1e-5, atol=1e-5)


def links(output):
    return len(output.grad_fn.metadata["cheapgrad_chain"].chain.links)


class Shared(nn.Module):
    """Consumers of one norm: three layers, a residual, and a layer that is not converted; and layers called twice."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])

    def forward(self, x):
        x = self.norm(x)
        query, key, value, plain = (layer(x) for layer in self.layers)
        mixed = functional.silu(query) * key + value + plain + x
        return self.layers[0](functional.relu(self.layers[0](self.norm(mixed))))


def shared():
    stock = Shared()
    model = copy.deepcopy(stock)
    approximate(model, Rule("norm", cotangent=HALF), Rule("layers.[012]", cotangent=HALF), skip_small=False)
    return model, stock
