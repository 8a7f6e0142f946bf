"""Chains where exact gradients, transforms, other strategies, copies, or numbers that are not finite are asked for."""

from __future__ import annotations

import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from cheapgrad import Rule, approximate, get_handle
from cheapgrad.cost import measure_held_bytes
from cheapgrad.errors import ForwardModeError, SecondDerivativeError
from cheapgrad.sketch import ColumnSample, ExampleSample, RowSample, StochasticRounding
from tests.ops.chains.networks import HALF, convert
from tests.ops.chains.small_networks import (
    WIDTH,
    Network,
    assert_same,
    gradients,
    links,
    pair,
)


def test_exact_eval_no_grad_and_revert():
    model, stock = pair()
    handle, x = get_handle(model), torch.randn(10, WIDTH)

    def is_exact():
        pairs = zip(gradients(model, x), gradients(stock, x), strict=True)
        return all(torch.equal(one, two) for one, two in pairs)

    assert not is_exact()
    with handle.exact():
        assert is_exact()
    model.eval()
    assert is_exact()
    model.train()
    with torch.no_grad():
        assert torch.equal(model(x), stock(x))
    with torch.inference_mode():
        assert torch.equal(model(x), stock(x))
    handle.revert()
    assert is_exact()


def test_one_layer_in_eval_mode_ends_the_chain(full):
    model, stock = pair()
    model.expand.eval()
    assert links(model(torch.randn(10, WIDTH, requires_grad=True))) == 1
    assert_same(model, stock)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU(), nn.Tanh()])
def test_functional_transforms(activation, full):
    model, stock = pair(activation)
    x = torch.randn(4, 10, WIDTH)
    results = []
    for network in (model, stock):
        parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}

        def loss(parameters, x, network=network):
            return functional_call(network, parameters, (x,)).square().sum()

        results.append(vmap(grad(loss), in_dims=(None, 0), randomness="different")(parameters, x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_autocast(full):
    def run(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    model, stock = pair()
    x = torch.randn(10, WIDTH)
    assert torch.equal(run(model, x), run(stock, x))
    torch.testing.assert_close(gradients(model, x, run), gradients(stock, x, run), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(
    "rules",
    [
        (Rule(cotangent=HALF), Rule("contract", cotangent=RowSample(0.3))),
        (Rule("expand", cotangent=HALF), Rule("contract", cotangent=ColumnSample(0.5))),
        (Rule("expand", cotangent=ExampleSample(0.5)), Rule("contract", cotangent=HALF)),
    ],
    ids=repr,
)
def test_layers_that_draw_differently_are_not_joined(rules):
    model = Network()
    approximate(model, *rules, skip_small=False)
    output = model(torch.randn(4, 5, WIDTH, requires_grad=True))
    holder = output.grad_fn.metadata.get("cheapgrad_chain")
    assert holder is None or len(holder.chain.links) == 1


def test_examples_are_drawn_whole():
    model, _ = pair(cotangent=ExampleSample(0.5))
    leaf = torch.randn(6, 5, WIDTH, requires_grad=True)
    output = model(leaf)
    assert links(output) == 4
    output.square().sum().backward()
    kept = (leaf.grad != 0).any(-1)
    assert torch.equal(kept.all(1), kept.any(1))
    assert kept.any(1).sum() == 3


@pytest.mark.parametrize("fields", [{}, {"stored": StochasticRounding(4)}], ids=["rows", "codes"])
@pytest.mark.parametrize("keep_output", [False, True])
def test_nothing_outlives_the_graph(fields, keep_output):
    alive = []
    model = Network(visit=lambda at, tensor: alive.append(weakref.ref(tensor)) or tensor)
    convert(model, **fields)
    root = torch.randn(10, WIDTH, requires_grad=True) * 1
    watched = weakref.ref(root)
    output = model(root)
    del root
    output.square().sum().backward()
    if not keep_output:
        del output
    # Without the collector: no cycle keeps anything.
    assert watched() is None
    assert [reference() is not None for reference in alive] == [False, False, False, keep_output]
    gc.collect()


def test_a_chain_holds_no_more_than_pytorch():
    model, stock = pair()
    x = torch.randn(64, WIDTH)
    held, stock_held = (measure_held_bytes(lambda m=m: m(x).sum(), exclude=[m]).total_bytes for m in (model, stock))
    assert held < stock_held
    # The root, what the activation reads, and mean and deviation per row.
    assert held == 64 * 4 * (WIDTH + 12 + 2)


def test_outputs_can_be_pickled():
    model, _ = pair()
    output = model(torch.randn(3, WIDTH))
    buffer = io.BytesIO()
    torch.save(output, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True), output)


@pytest.mark.parametrize("fields", [{}, {"stored": StochasticRounding(4)}], ids=["rows", "codes"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["input", "cotangent", "expand.weight", "norm.weight"])
def test_what_is_not_finite_is_not_hidden(where, value, fields):
    for turn in range(4):
        torch.manual_seed(turn)
        model = Network()
        convert(model, **fields)
        x, cotangent = torch.randn(16, WIDTH), torch.randn(16, WIDTH)
        spoilt = {"input": x, "cotangent": cotangent, **dict(model.named_parameters())}[where]
        with torch.no_grad():
            spoilt[3, ...] = value
        x.requires_grad_()
        model(x).backward(cotangent)
        assert not torch.isfinite(model.contract.weight.grad).all()
        assert not all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("shape", [(0,), (), (1,), (3, 0), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("fields", [{}, {"stored": StochasticRounding(4)}], ids=["rows", "codes"])
def test_awkward_shapes(shape, fields):
    model, stock = pair(**fields)
    x = torch.randn(*shape, WIDTH, requires_grad=True)
    assert torch.equal(model(x), stock(x))
    assert [g.shape for g in gradients(model, x.detach())] == [g.shape for g in gradients(stock, x.detach())]


def test_second_derivatives_and_forward_mode_are_refused():
    model, _ = pair()
    leaf = torch.randn(10, WIDTH, requires_grad=True)
    (first,) = torch.autograd.grad(model(leaf).pow(3).sum(), leaf, create_graph=True)
    with pytest.raises(SecondDerivativeError, match="row-wise chain"):
        first.sum().backward()
    with pytest.raises(ForwardModeError, match="forward-mode"):
        torch.func.jvp(model, (leaf.detach(),), (leaf.detach(),))
