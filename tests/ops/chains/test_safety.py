"""Chains never pass over a tensor that somebody watches, overwrites, shares or asks about."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cheapgrad.errors import PassedOverError
from cheapgrad.ops.chains.chain import chain_of
from cheapgrad.sketch import StochasticRounding
from tests.ops.chains.networks import convert
from tests.ops.chains.small_networks import (
    NAMES,
    WIDTH,
    Network,
    assert_same,
    every_activation,
    gradients,
    links,
    pair,
    shared,
)


@every_activation
def test_chains_are_as_long_as_they_can_be(activation):
    model, _ = pair(activation)
    output = model(torch.randn(10, WIDTH, requires_grad=True))
    # What an activation in place overwrote, nobody needs: the layer before it has its own input.
    assert links(output) == 4


@every_activation
def test_overwriting_activations_are_right(activation, full):
    assert_same(*pair(activation))


@pytest.mark.parametrize("name", NAMES[:3])
def test_a_tensor_overwritten_in_place_is_the_one_that_counts(name, full):
    model, stock = pair()
    for network in (model, stock):
        network.visit = lambda at, tensor: tensor.add_(0.5) if at == name else tensor
    assert_same(model, stock)


WAYS = ("hook", "hook that changes", "retain", "capture")


def ask(way, tensor, seen):
    if way == "hook":
        tensor.register_hook(lambda gradient: seen.append(gradient.clone()))
    elif way == "hook that changes":
        tensor.register_hook(lambda gradient: seen.append(gradient.clone()) or 2 * gradient)
    else:
        tensor.retain_grad()
        seen.append(tensor)


@every_activation
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS[:3])
@pytest.mark.parametrize("later", [False, True], ids=["at once", "after the forward pass"])
def test_whoever_asks_sees_the_gradient(activation, name, way, later, full):
    if later and name == "expand" and activation is not functional.gelu:
        pytest.skip("an overwritten tensor is another one")
    results = []
    model, stock = pair(activation)
    for network in (model, stock):
        seen, kept = [], []

        def visit(at, tensor, seen=seen, kept=kept):
            if at == name:
                kept.append(tensor) if later else ask(way, tensor, seen)
            return tensor

        network.visit = visit
        torch.manual_seed(1)
        leaf = torch.randn(10, WIDTH, requires_grad=True)
        output = network(leaf)
        if later:
            ask(way, kept.pop(), seen)
        output.square().sum().backward()
        shown = [value.grad if value.requires_grad else value for value in seen]
        results.append([leaf.grad, *shown, *[parameter.grad for parameter in network.parameters()]])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_a_hook_on_a_tensor_that_codes_have_replaced_is_refused():
    kept = []
    model = Network(visit=lambda at, tensor: kept.append(tensor) or tensor)
    convert(model, stored=StochasticRounding(4))
    output = model(torch.randn(10, WIDTH, requires_grad=True))
    kept[2].register_hook(lambda gradient: None)
    with pytest.raises(PassedOverError, match=r"intermediate tensor of shape \(10, 12\).*`with handle\.exact\(\):`"):
        output.sum().backward()


@pytest.mark.parametrize("name", NAMES[:3])
@pytest.mark.parametrize("others", [False, True], ids=["alone", "with parameters"])
@pytest.mark.parametrize("activation", [functional.gelu, functional.relu])
def test_autograd_grad_of_an_intermediate_tensor(activation, name, others, full):
    # Used twice: by the next layer, and by the loss.
    results = []
    for network in pair(activation):
        kept = {}
        network.visit = lambda at, tensor, kept=kept: kept.setdefault(at, tensor)
        torch.manual_seed(1)
        output = network(torch.randn(10, WIDTH, requires_grad=True))
        loss = output.square().sum() + kept[name].pow(3).sum()
        wanted = [kept[name], *(network.parameters() if others else [])]
        results.append(torch.autograd.grad(loss, wanted))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_module_hooks_see_the_gradients(full):
    results = []
    for network in pair(nn.GELU()):
        seen = []
        for module in (network.norm, network.expand, network.activation, network.contract):
            module.register_full_backward_hook(
                lambda module, inputs, outputs, seen=seen: seen.extend([*inputs, *outputs])
            )
        torch.manual_seed(1)
        network(torch.randn(10, WIDTH, requires_grad=True)).square().sum().backward()
        results.append(seen)
    assert len(results[0]) == 8
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_tensors_and_modules_used_several_times(full):
    assert_same(*shared())


def test_they_are_unbiased_without_help():
    # With all consumers drawing apart: the mean of fixed draws against its own standard error.
    model, stock = shared()
    x = torch.randn(16, WIDTH)
    exact = torch.cat([gradient.flatten() for gradient in gradients(stock, x)])
    draws = torch.stack([torch.cat([g.flatten() for g in gradients(model, x)]) for _ in range(300)])
    along = (draws * exact).sum(1) / exact.square().sum()
    error = along.std() / 300**0.5
    assert error < 0.05
    assert (along.mean() - 1).abs() < 5 * error


def test_several_backward_passes_and_accumulation(full):
    model, stock = pair()
    x = torch.randn(10, WIDTH)
    for network in (model, stock):
        output = network(x)
        output.sum().backward(retain_graph=True)
        output.square().sum().backward()
        network(x).sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            output.sum().backward()
    pairs = list(zip(model.parameters(), stock.parameters(), strict=True))
    torch.testing.assert_close([one.grad for one, _ in pairs], [two.grad for _, two in pairs], rtol=1e-5, atol=1e-5)


def test_every_backward_pass_draws_anew():
    model, _ = pair()
    leaf = torch.randn(10, WIDTH, requires_grad=True)
    output = model(leaf)
    first, second = (torch.autograd.grad(output.square().sum(), leaf, retain_graph=True)[0] for _ in range(2))
    assert not torch.equal(first, second)
    assert (first == 0).all(1).sum() == 5


def test_a_tensor_joined_after_its_backward_pass():
    model, _ = pair()
    hidden = model.norm(torch.randn(10, WIDTH, requires_grad=True))
    hidden.sum().backward()
    assert chain_of(hidden) is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints(use_reentrant, full):
    assert_same(*pair(), run=lambda model, x: checkpoint(model, x, use_reentrant=use_reentrant))
