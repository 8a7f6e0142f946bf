"""A chain's backward pass on given rows against the oracle, and on all rows against PyTorch."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from cheapgrad.convert.kinds.row_wise import ROW_WISE
from cheapgrad.ops.activation import activation_names
from cheapgrad.sketch import RowSample, StochasticRounding
from tests.ops.chains.networks import (
    ACTIVATIONS,
    FEATURES,
    HALF,
    HIDDEN,
    OUTPUTS,
    RECOGNISED,
    Chosen,
    Function,
    choose_all_rows,
    convert,
    draw_parameters,
    oracle_of,
)
from tests.oracles.activations import SLOPES
from tests.oracles.row_wise_chain import chain_forward, chain_gradients

# Twice the same row, as designs with replacement draw it, and no order.
INDEX, WEIGHT = [4, 0, 4, 6], [1.5, 2.25, 1.5, 3.0]
ROWS = 8


def norm_linear(affine=True, bias=True):
    return [nn.LayerNorm(FEATURES, elementwise_affine=affine, bias=bias), nn.Linear(FEATURES, OUTPUTS, bias=bias)]


def linear_linear(middle, bias=True):
    return [nn.Linear(FEATURES, HIDDEN, bias=bias), middle, nn.Linear(HIDDEN, OUTPUTS, bias=bias)]


def norm_linear_linear(middle, affine=True, bias=True):
    return [nn.LayerNorm(FEATURES, elementwise_affine=affine, bias=bias), *linear_linear(middle, bias)]


def _networks():
    for affine, bias in ((True, True), (True, False), (False, True)):
        yield f"norm linear, affine={affine}, bias={bias}", lambda a=affine, b=bias: norm_linear(a, b)
    for (name, options), module in ACTIVATIONS.items():
        named = f"{name}{dict(options) or ''}"
        yield f"norm linear {named} linear", lambda m=module: norm_linear_linear(copy.deepcopy(m))
        if not options:
            yield f"linear {named} linear", lambda m=module: linear_linear(copy.deepcopy(m))
            yield f"{named} linear", lambda m=module: [copy.deepcopy(m), nn.Linear(FEATURES, OUTPUTS)]
        if (name, options) in RECOGNISED:
            yield f"norm linear functional {named} linear", lambda m=module: norm_linear_linear(Function(m), bias=False)
    yield "linear linear", lambda: linear_linear(nn.Identity())[::2]
    yield (
        "linear norm linear gelu",
        lambda: [nn.Linear(FEATURES, HIDDEN), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 4), nn.GELU()],
    )
    yield (
        "norm of a norm, and two activations",
        lambda: [nn.LayerNorm(FEATURES), nn.LayerNorm(FEATURES), nn.Tanh(), nn.GELU(), nn.Linear(FEATURES, 3)],
    )


NETWORKS = dict(_networks())
every_network = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)


def problem(model, shape=(2, 4), requires_grad=True):
    """Return a random root and cotangent."""
    x = torch.randn(*shape, FEATURES, dtype=torch.float64, requires_grad=requires_grad)
    return x, torch.randn_like(model(x.detach()))


def as_matrix(tensor):
    return tensor.detach().reshape(-1, tensor.shape[-1])


@every_network
@pytest.mark.parametrize("shape", [(ROWS,), (2, 4)], ids=str)
def test_gradients_are_those_of_the_oracle(build, shape, monkeypatch):
    model = nn.Sequential(*draw_parameters(nn.Sequential(*[m for m in build() if not isinstance(m, nn.Identity)])))
    stages = oracle_of(model)
    x, cotangent = problem(model, shape)
    chosen = Chosen(monkeypatch, INDEX, WEIGHT)
    convert(model)
    output = model(x)
    torch.testing.assert_close(as_matrix(output), chain_forward(stages, as_matrix(x)), rtol=1e-10, atol=1e-12)
    output.backward(cotangent)
    grad_root, gradients = chain_gradients(stages, as_matrix(x), as_matrix(cotangent), chosen.weight_N(ROWS))
    found = [as_matrix(x.grad), *[parameter.grad for parameter in model.parameters()]]
    # PyTorch's own hardsigmoid has a slope of 1/6 in single precision.
    rtol, atol = (1e-7, 1e-6) if "ardsigmoid" in repr(model) + repr(stages) else (1e-10, 1e-12)
    torch.testing.assert_close(found, [grad_root, *gradients], rtol=rtol, atol=atol)
    assert len(chosen.cotangents) == 1, "one draw serves the chain"
    assert torch.equal(chosen.cotangents[0], as_matrix(cotangent))


# Formulas of another library's classes; `tests.networks` has those.
OTHERS = {"gelu_written_out", "quick_gelu"}


def test_every_activation_is_here():
    assert {name for name, _ in ACTIVATIONS} == set(activation_names()) - OTHERS
    assert set(ACTIVATIONS) == {(name, options) for name, options in SLOPES if name not in OTHERS}
    kinds = {type(module).__name__ for module in ACTIVATIONS.values()} | {"LayerNorm"}
    assert kinds == {kind.name for kind in ROW_WISE}


@pytest.mark.parametrize("root_needs_grad", [True, False], ids=["root", "no root"])
def test_every_subset_of_frozen_parameters(root_needs_grad, monkeypatch):
    model = draw_parameters(nn.Sequential(*norm_linear_linear(nn.GELU())))
    stages, parameters = oracle_of(model), list(model.parameters())
    x, cotangent = problem(model, requires_grad=root_needs_grad)
    chosen = Chosen(monkeypatch, INDEX, WEIGHT)
    grad_root, gradients = chain_gradients(stages, as_matrix(x), as_matrix(cotangent), chosen.weight_N(ROWS))
    convert(model)
    for wanted in itertools.product((True, False), repeat=len(parameters)):
        x.grad = None
        for parameter, flag in zip(parameters, wanted, strict=True):
            parameter.grad = None
            parameter.requires_grad_(flag)
        output = model(x)
        assert output.requires_grad == (root_needs_grad or any(wanted))
        if not output.requires_grad:
            continue
        output.backward(cotangent)
        assert (x.grad is not None) == root_needs_grad
        # Nothing before the last layer needs a gradient: it works alone, and sums the whole cotangent for its bias.
        alone = not root_needs_grad and not any(wanted[:-2])
        expected = [*gradients[:-1], as_matrix(cotangent).sum(0) if alone else gradients[-1]]
        if root_needs_grad:
            torch.testing.assert_close(as_matrix(x.grad), grad_root, rtol=1e-10, atol=1e-12)
        for parameter, flag, gradient in zip(parameters, wanted, expected, strict=True):
            assert (parameter.grad is not None) == flag
            if flag:
                torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


@every_network
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_all_rows_give_the_gradients_of_pytorch(build, dtype, monkeypatch):
    # The same kernels on the same rows: bit for bit but where a product is formed in another order of operands.
    model = nn.Sequential(*draw_parameters(nn.Sequential(*build()))).to(dtype)
    stock = copy.deepcopy(model)
    x = torch.randn(12, FEATURES, dtype=dtype)
    choose_all_rows(monkeypatch)
    convert(model)
    results = []
    for network in (model, stock):
        leaf = x.clone().requires_grad_()
        output = network(leaf)
        cotangent = torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output)
        output.backward(cotangent)
        results.append([output.detach(), leaf.grad, *[parameter.grad for parameter in network.parameters()]])
    if any(isinstance(module, (nn.LogSigmoid, nn.Softsign, nn.Tanhshrink)) for module in model):
        # A kernel that wants what only its own forward pass leaves behind, and sums formed in another order.
        torch.testing.assert_close(*results)
    else:
        assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


FIELDS = (
    {"cotangent": HALF},
    {"cotangent": None, "stored": StochasticRounding(4)},
    {"cotangent": HALF, "stored": StochasticRounding(8)},
)


@every_network
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_is_bit_identical(build, dtype):
    model = nn.Sequential(*draw_parameters(nn.Sequential(*build()))).to(dtype)
    stock = copy.deepcopy(model)
    inputs = [torch.randn(*shape, FEATURES, dtype=dtype, requires_grad=True) for shape in ((3, 7), (2, 1, 4), ())]
    for fields in FIELDS:
        handle = convert(model, **fields)
        assert all(torch.equal(model(x), stock(x)) for x in inputs)
        handle.revert()


@every_network
def test_full_budget_runs_stock_code(build):
    model = nn.Sequential(*build())
    stock, x = copy.deepcopy(model), torch.randn(2, 4, FEATURES)
    with pytest.warns(UserWarning, match="full budget"):
        convert(model, RowSample(1.0))
    for network in (model, stock):
        network(x).square().sum().backward()
    pairs = zip(model.parameters(), stock.parameters(), strict=True)
    assert all(torch.equal(one.grad, two.grad) for one, two in pairs)
