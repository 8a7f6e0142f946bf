"""Gated feed-forwards: one draw of rows for gate, up and down, and codes of two inner tensors."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cheapgrad import Rule, approximate
from cheapgrad.cost import measure_held_bytes
from cheapgrad.errors import PassedOverError
from cheapgrad.ops.chains import gated_stage
from cheapgrad.ops.chains.chain import chain_of
from cheapgrad.ops.chains.gated_stage import GatedStage
from cheapgrad.sketch import RowSample, StochasticRounding
from tests.ops.chains.networks import HALF, Chosen, choose_all_rows, draw_parameters

ROWS, WIDTH, INNER, OUTPUTS = 6, 5, 7, 4


class Gated(nn.Module):
    """``down(f(gate(x)) * up(x))``, with a norm before it or not."""

    def __init__(self, activation, *, norm=False, bias=False, swapped=False):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH) if norm else nn.Identity()
        self.gate, self.up = nn.Linear(WIDTH, INNER, bias=bias), nn.Linear(WIDTH, INNER, bias=bias)
        self.down, self.swapped = nn.Linear(INNER, OUTPUTS, bias=bias), swapped
        if isinstance(activation, nn.Module):
            self.activation = activation
        else:
            self.__dict__["activation"] = activation
        draw_parameters(self)

    def forward(self, x):
        h = self.norm(x)
        if self.swapped:
            return self.down(self.up(h) * self.activation(self.gate(h)))
        return self.down(self.activation(self.gate(h)) * self.up(h))


ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "relu": functional.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "SiLU": nn.SiLU(),
    "GELU": nn.GELU(),
    "Sigmoid": nn.Sigmoid(),
}
OPTIONS = {
    "plain": {},
    "norm": {"norm": True},
    "bias": {"bias": True, "norm": True},
    "swapped": {"swapped": True},
}


def convert(model, **fields):
    return approximate(model, Rule("*", **fields), skip_small=False)


def rows(count=ROWS):
    return torch.randn(count, WIDTH, dtype=torch.float64, requires_grad=True)


def gradients(model, x, cotangent=None):
    output = model(x)
    if cotangent is None:
        cotangent = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(5))
    wanted = [tensor for tensor in (x, *model.parameters()) if tensor.requires_grad]
    for tensor in wanted:
        tensor.grad = None
    output.backward(cotangent)
    return tuple(tensor.grad for tensor in wanted)


def has_gate(output):
    chain = chain_of(output)
    return chain is not None and any(isinstance(link.stage, GatedStage) for link in chain.links)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_equal_to_stock_bit_for_bit_where_all_rows_are_kept(activation, options, recompute, monkeypatch):
    choose_all_rows(monkeypatch)
    model = Gated(activation, **options)
    ours, x = copy.deepcopy(model), rows()
    convert(ours, cotangent=HALF, recompute=recompute)
    output = ours(x)
    assert has_gate(output)
    assert torch.equal(output, model(x))
    for one, other in zip(gradients(ours, x), gradients(model, x), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("activation", ["silu", "SiLU", "sigmoid"])
def test_one_draw_serves_all_and_the_mean_of_all_outcomes_is_the_gradient(activation, options, monkeypatch):
    model = Gated(ACTIVATIONS[activation], **options)
    ours, x = copy.deepcopy(model), rows()
    convert(ours, cotangent=HALF)
    outcomes = list(itertools.combinations(range(ROWS), 3))
    total = None
    for index in outcomes:
        chosen = Chosen(monkeypatch, index, [2.0] * 3)
        drawn = [part / len(outcomes) for part in gradients(ours, x)]
        assert len(chosen.cotangents) == 1, "one draw at the output"
        total = drawn if total is None else [one + other for one, other in zip(total, drawn, strict=True)]
    torch.testing.assert_close(tuple(total), gradients(model, x), rtol=1e-10, atol=1e-12)


class RecordedCodec:
    """Stands for the codec of the inner tensors: keeps them, changed by a factor of its own for each."""

    def __init__(self, monkeypatch, factors):
        self.factors, self.seen = factors, []
        monkeypatch.setattr(gated_stage, "_encode", self._encode)

    def _encode(self, codec, tensor):
        self.seen.append(tensor.detach())
        return codec.store(_operands(tensor * self.factors[len(self.seen) - 1]))


def _operands(tensor):
    from cheapgrad.sketch import DenseMatrix, Moment, Operands

    return Operands(Moment.STORED, DenseMatrix(tensor.reshape(-1, tensor.shape[-1])))


def mean_and_error(model, x, draws):
    """Return the mean of many gradients as one vector, and the standard error of its length."""
    many = torch.stack([torch.cat([part.flatten() for part in gradients(model, x)]) for _ in range(draws)])
    return many.mean(0), float((many.var(0).sum() / draws).sqrt())


DRAWS = 400


@pytest.mark.parametrize(("activation", "options"), [("silu", "plain"), ("SiLU", "plain"), ("relu", "bias")])
def test_codes_are_unbiased(activation, options):
    model = Gated(ACTIVATIONS[activation], **OPTIONS[options])
    ours, x = copy.deepcopy(model), rows()
    convert(ours, stored=StochasticRounding(4))
    assert has_gate(ours(x))
    exact = torch.cat([part.flatten() for part in gradients(model, x)])
    mean, error = mean_and_error(ours, x, DRAWS)
    assert error < 0.01 * float(exact.norm()), "too few draws to tell"
    assert float((mean - exact).norm()) < 2.3 * error


@pytest.mark.parametrize("factors", [(1.03, 1.0), (1.0, 1.03)], ids=["a", "u f'(g)"])
def test_a_biased_twin_is_caught(factors, monkeypatch):
    model = Gated(functional.silu)
    ours, x = copy.deepcopy(model), rows()
    convert(ours, stored=StochasticRounding(8))
    exact = torch.cat([part.flatten() for part in gradients(model, x)])
    total = 0
    for _ in range(40):
        RecordedCodec(monkeypatch, factors)
        total = total + torch.cat([part.flatten() for part in gradients(ours, x)]) / 40
    assert float((total - exact).norm()) > 0.01 * float(exact.norm())


def held(model, x):
    model(x).sum().backward()
    return measure_held_bytes(lambda: model(x), exclude=[model, x]).total_bytes


@pytest.mark.parametrize("activation", [functional.silu, nn.SiLU()], ids=["function", "module"])
@pytest.mark.parametrize("both", [False, True])
def test_codes_of_three_inner_tensors_are_held(activation, both):
    model = Gated(activation, norm=True).float()
    x = torch.randn(64, WIDTH, requires_grad=True)
    convert(model, stored=StochasticRounding(4, group=16), **({"cotangent": HALF} if both else {}))
    # Of a, of u f'(g) and of h: 7 entries of half a byte in a row, and what a group's scale takes.
    inner = 3 * (64 * 4 + 2 * 2 * 64 * INNER / 16)
    # The norm: two codes and the reciprocal deviation.
    norm = 2 * (64 * 3 + 2 * 2 * 64 * WIDTH / 16) + 64 * 4
    assert held(model, x) <= 1.1 * (inner + norm) + 64


def test_without_codes_nothing_is_held_twice():
    model = Gated(functional.silu).float()
    x = torch.randn(64, WIDTH, requires_grad=True)
    exact = held(model, x)
    assert exact == 64 * 4 * INNER * 4, "g, a, u and h"
    convert(model, cotangent=HALF)
    # The rows of h are formed again from g and u; a is held by PyTorch's own product.
    assert held(model, x) == exact - 64 * INNER * 4


@pytest.mark.parametrize("frozen", ["gate", "up", "down"])
@pytest.mark.parametrize("fields", [{"cotangent": HALF}, {"stored": StochasticRounding(8), "cotangent": HALF}])
def test_frozen_parts(frozen, fields, monkeypatch):
    choose_all_rows(monkeypatch)
    model = Gated(functional.silu, norm=True)
    getattr(model, frozen).requires_grad_(False)
    ours, x = copy.deepcopy(model), rows()
    convert(ours, **fields)
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if len(fields) == 1 else {"rtol": 0.1, "atol": 0.3}
    torch.testing.assert_close(gradients(ours, x), gradients(model, x), **tolerance)


class NotAlike(nn.Module):
    """Products that are no gated feed-forward."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, 1 if form == "broadcast" else INNER)
        self.down = nn.Linear(INNER, OUTPUTS)
        draw_parameters(self)

    def forward(self, x):
        gate, up = functional.silu(self.gate(x)), self.up(x + 1 if self.form == "inputs" else x)
        if self.form == "scalar":
            up = 2.0
        if self.form == "squared":
            up = gate
        if self.form == "no layer":
            up = torch.ones_like(gate, requires_grad=True) * 2
        if self.form == "no activation":
            gate = gate + 1
        if self.form == "overwritten":
            return self.down((gate * up).mul_(2))
        return self.down(gate * up)


@pytest.mark.parametrize(
    "form", ["inputs", "broadcast", "scalar", "squared", "no layer", "no activation", "overwritten"]
)
def test_other_products_are_not_taken_for_one(form, monkeypatch):
    choose_all_rows(monkeypatch)
    model = NotAlike(form)
    ours, x = copy.deepcopy(model), rows()
    convert(ours, cotangent=HALF)
    assert not has_gate(ours(x))
    loss = torch.randn(ROWS, OUTPUTS, dtype=torch.float64)
    results = []
    for one in (model, ours):
        one.zero_grad()
        (one(x) * loss).sum().backward()
        results.append([parameter.grad for parameter in one.parameters()])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("where", ["gate", "up", "activation"])
def test_a_hook_ends_the_chain_and_sees_the_gradient(where, monkeypatch):
    choose_all_rows(monkeypatch)
    model, x = Gated(nn.SiLU()), rows()
    ours = copy.deepcopy(model)
    convert(ours, cotangent=HALF)
    seen = []
    for one in (model, ours):
        getattr(one, where).register_forward_hook(
            lambda module, args, output: output.retain_grad() or seen.append(output)
        )
        one(x).square().sum().backward()
    torch.testing.assert_close(seen[1].grad, seen[0].grad)
    torch.testing.assert_close(ours.gate.weight.grad, model.gate.weight.grad)


def test_a_late_question_is_answered_or_refused(monkeypatch):
    choose_all_rows(monkeypatch)
    model, x = Gated(nn.SiLU()), rows()
    answers = []
    for fields in (None, {"cotangent": HALF}, {"stored": StochasticRounding(8), "cotangent": HALF}):
        ours, seen = copy.deepcopy(model), []
        if fields is not None:
            convert(ours, **fields)
        ours.up.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        loss = ours(x).square().sum()
        seen[0].retain_grad()
        if fields is not None and "stored" in fields:
            with pytest.raises(PassedOverError, match=r"\(6, 7\)"):
                loss.backward()
            continue
        loss.backward()
        answers.append(seen[0].grad)
    torch.testing.assert_close(*answers)


def test_inside_a_checkpoint_the_block_runs_once_forward():
    model, x = Gated(functional.silu, norm=True), rows()
    convert(model, stored=StochasticRounding(8), cotangent=HALF)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    output = checkpoint(model, x, use_reentrant=False)
    assert len(calls) == 1
    output.sum().backward()


def test_under_autocast_gradients_are_those_of_the_parameters():
    model = Gated(functional.silu, norm=True).float()
    convert(model, stored=StochasticRounding(4), cotangent=RowSample(0.5))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randn(64, WIDTH, requires_grad=True))
    assert has_gate(output)
    output.sum().backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
