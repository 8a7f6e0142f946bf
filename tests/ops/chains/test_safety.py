"""Chains never pass over a tensor that somebody watches, overwrites, shares or asks about."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cheapgrad import Rule, approximate, get_handle
from cheapgrad.cost import measure_held_bytes
from cheapgrad.errors import ForwardModeError, PassedOverError, SecondDerivativeError
from cheapgrad.ops.chains.chain import chain_of
from cheapgrad.sketch import ColumnSample, ExampleSample, RowSample, StochasticRounding
from tests.ops.chains.networks import HALF, choose_all_rows, convert

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


@pytest.fixture
def full(monkeypatch):
    """Keep all rows: every gradient is to be PyTorch's."""
    choose_all_rows(monkeypatch)


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
