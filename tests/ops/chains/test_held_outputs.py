"""Activations whose slope is a function of their output hold the output, which a stock layer behind them holds too."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cheapgrad import approximate, recipes
from cheapgrad.cost import measure_held_bytes
from tests.ops.chains.networks import choose_all_rows, convert
from tests.oracles.live_storages import assert_nothing_is_uncounted

ROWS, HIDDEN, CLASSES = 32, 160, 10
READ_OUTPUT = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
READ_INPUT = {"gelu": nn.GELU, "leaky_relu": nn.LeakyReLU, "relu6": nn.ReLU6}
every_module = pytest.mark.parametrize("make", READ_OUTPUT.values(), ids=READ_OUTPUT)


def perceptron(make, norm=False):
    """Return two hidden layers and a head too small to be converted."""
    norms = [nn.LayerNorm(HIDDEN)] if norm else []
    hidden = [nn.Linear(HIDDEN, HIDDEN), *norms, make(), nn.Linear(HIDDEN, HIDDEN), *norms, make()]
    return nn.Sequential(*hidden, nn.Linear(HIDDEN, CLASSES))


def problem(model):
    x, labels = torch.randn(ROWS, HIDDEN), torch.randint(0, CLASSES, (ROWS,))
    return x, lambda: functional.cross_entropy(model(x), labels)


def count_bytes(model):
    x, compute_loss = problem(model)
    compute_loss().backward()
    return measure_held_bytes(compute_loss, exclude=[model, x]).total_bytes


@every_module
@pytest.mark.parametrize("skip_small", [True, False])
def test_a_perceptron_holds_what_pytorch_does(make, skip_small):
    model = perceptron(make)
    stock = count_bytes(model)
    handle = approximate(model, recipes.speed(0.3), skip_small=skip_small)
    assert ("too small" in str(handle)) == skip_small
    # Two hidden tensors and the loss: the input is the batch's own.
    assert count_bytes(model) == stock


@pytest.mark.parametrize("make", READ_INPUT.values(), ids=READ_INPUT)
def test_others_hold_their_input_and_no_more_than_pytorch(make):
    model = perceptron(make)
    stock = count_bytes(model)
    approximate(model, recipes.speed(0.3))
    # The first hidden layer's output is computed again from its input; the last one's is held by the head.
    assert count_bytes(model) == stock - 4 * ROWS * HIDDEN


@pytest.mark.parametrize("make", [*READ_OUTPUT.values(), *READ_INPUT.values()], ids=[*READ_OUTPUT, *READ_INPUT])
def test_behind_a_norm_nothing_is_held_for_the_activation(make):
    model = nn.Sequential(nn.LayerNorm(HIDDEN), make(), nn.Linear(HIDDEN, HIDDEN))
    approximate(model, recipes.speed(0.3), skip_small=False)
    x = torch.randn(ROWS, HIDDEN)
    held = measure_held_bytes(lambda: model(x).sum(), exclude=[model, x]).total_bytes
    # Mean and deviation of each row.
    assert held == 4 * 2 * ROWS


@every_module
def test_nothing_is_alive_that_is_not_counted(make):
    model = perceptron(make)
    approximate(model, recipes.speed(0.3))
    x = torch.randn(ROWS, HIDDEN)
    assert_nothing_is_uncounted(model, x, lambda: model(x).square().mean())


@every_module
def test_no_cycle_keeps_the_output(make):
    model = perceptron(make)
    approximate(model, recipes.speed(0.3))
    outputs = []
    model[3].register_forward_hook(lambda module, inputs, output: outputs.append(weakref.ref(output)))
    model[1].register_forward_hook(lambda module, inputs, output: outputs.append(weakref.ref(output)))
    _, compute_loss = problem(model)
    gc.disable()
    try:
        loss = compute_loss()
        del loss
        assert [reference() for reference in outputs] == [None, None]
    finally:
        gc.enable()


@every_module
@pytest.mark.parametrize("norm", [False, True])
def test_gradients_with_all_rows_are_those_of_pytorch(make, norm, monkeypatch):
    choose_all_rows(monkeypatch)
    stock = perceptron(make, norm).double()
    model = copy.deepcopy(stock)
    convert(model)
    x = torch.randn(ROWS, HIDDEN, dtype=torch.float64)
    results = []
    for network in (model, stock):
        leaf = x.clone().requires_grad_()
        network(leaf).square().sum().backward()
        results.append([leaf.grad, *[parameter.grad for parameter in network.parameters()]])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def run_plainly(model, x):
    return model(x)


def run_under_autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model(x).float()


def run_checkpointed(model, x):
    return checkpoint(model, x, use_reentrant=False)


def run_compiled(model, x):
    torch.compiler.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)(x)


def run_mapped(model, x):
    return vmap(lambda row: model(row.unsqueeze(0)).squeeze(0))(x)


RUNS = [run_plainly, run_under_autocast, run_checkpointed, run_compiled, run_mapped]


@every_module
@pytest.mark.parametrize("run", RUNS)
def test_contexts(make, run, monkeypatch):
    choose_all_rows(monkeypatch)
    stock = perceptron(make)
    model = copy.deepcopy(stock)
    convert(model)
    x, results = torch.randn(ROWS, HIDDEN), []
    for network in (model, stock):
        leaf = x.clone().requires_grad_()
        run(network, leaf).square().sum().backward()
        results.append([leaf.grad, *[parameter.grad for parameter in network.parameters()]])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@every_module
def test_an_output_that_is_overwritten_is_an_error_as_it_is_in_pytorch(make):
    for is_converted in (False, True):
        model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), make())
        if is_converted:
            approximate(model, recipes.speed(0.3))
        output = model(torch.randn(ROWS, HIDDEN)).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
