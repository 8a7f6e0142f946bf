"""Which functions are reached, in eager mode and compiled: every one that the documentation lists, and no other."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from cheapgrad import approximate
from cheapgrad.cost import measure_held_bytes
from tests.convert.test_uncovered import NOT_REACHED, ROWS, RULE, WIDTH, Between
from tests.ops.chains.networks import Attention

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
# As the documentation names them.
REACHED = {
    "F.celu": functional.celu,
    "F.elu": functional.elu,
    "F.gelu": functional.gelu,
    "F.hardsigmoid": functional.hardsigmoid,
    "F.hardswish": functional.hardswish,
    "F.hardtanh": functional.hardtanh,
    "F.leaky_relu": functional.leaky_relu,
    "F.mish": functional.mish,
    "F.relu": functional.relu,
    "F.relu6": functional.relu6,
    "F.selu": functional.selu,
    "F.silu": functional.silu,
    "F.softplus": functional.softplus,
    "torch.relu": torch.relu,
    "torch.sigmoid": torch.sigmoid,
    "torch.tanh": torch.tanh,
}
REACHED_IN_EAGER_MODE = {"F.hardshrink": functional.hardshrink, "F.softshrink": functional.softshrink}
REACHED_IN_PLACE = {
    "F.hardsigmoid": lambda x: functional.hardsigmoid(x, inplace=True),
    "F.hardswish": lambda x: functional.hardswish(x, inplace=True),
    "F.hardtanh": functional.hardtanh_,
    "F.leaky_relu": functional.leaky_relu_,
    "F.mish": lambda x: functional.mish(x, inplace=True),
    "F.relu": functional.relu_,
    "F.relu6": lambda x: functional.relu6(x, inplace=True),
    "F.silu": lambda x: functional.silu(x, inplace=True),
    "torch.relu": torch.relu_,
    "torch.sigmoid": torch.sigmoid_,
    "torch.tanh": torch.tanh_,
}
OTHER_FORMS = {
    "of a tensor": lambda x: x.tanh(),
    "tanh gelu": lambda x: functional.gelu(x, approximate="tanh"),
    "elu of its own": lambda x: functional.elu(x, 0.5),
}
# Those with two slopes.
EXACT = {
    "F.hardshrink",
    "F.hardsigmoid",
    "F.hardtanh",
    "F.leaky_relu",
    "F.relu",
    "F.relu6",
    "F.softshrink",
    "torch.relu",
}
SDPA = "F.scaled_dot_product_attention"
WAYS = ("eager", "compiled")


class Gated(nn.Module):
    """A product of a function of one layer with another layer."""

    def __init__(self, function):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.function = function

    def forward(self, x):
        return self.down(self.function(self.gate(x)) * self.up(x))


def step(model, way, x):
    """Return a forward pass like all that follow the first one."""
    run = model
    if way == "compiled":
        torch._dynamo.reset()
        # With the decompositions and the partitioner of the default backend, without its code generation.
        run = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
    run(x).sum().backward()
    return lambda: run(x)


def held_bytes(model, way):
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    return measure_held_bytes(step(model, way, x), exclude=[model, x]).total_bytes


def holds_codes_alone(name, function, way):
    model = Between(function)
    handle = approximate(model, RULE, skip_small=False)
    held = held_bytes(model, way)
    # Compiled graphs note no sizes.
    model(torch.randn(ROWS, WIDTH))
    codes = sum(row.saved_bytes for row in handle.rows)
    # A branch in one bit, or a slope in four and two bytes per row.
    return held - codes == (ROWS * WIDTH // 8 if name in EXACT else ROWS * (WIDTH // 2 + 2))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", REACHED)
def test_functions_between_layers_hold_codes_alone(name, way):
    assert holds_codes_alone(name, REACHED[name], way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", REACHED_IN_EAGER_MODE)
def test_what_compilers_take_apart_is_reached_in_eager_mode_alone(name, way):
    assert holds_codes_alone(name, REACHED_IN_EAGER_MODE[name], way) == (way == "eager")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", REACHED_IN_PLACE)
def test_so_do_those_that_overwrite(name, way):
    assert holds_codes_alone(name, REACHED_IN_PLACE[name], way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OTHER_FORMS)
def test_so_do_methods_and_options(name, way):
    assert holds_codes_alone(name, OTHER_FORMS[name], way)


# Compiled gates take seconds, and find activations as eager ones do.
@pytest.mark.parametrize(
    ("name", "way"),
    [*((name, "eager") for name in REACHED), *((f"F.{name}", "compiled") for name in ("gelu", "silu", "elu", "relu"))],
)
def test_gates_hold_a_quarter(name, way):
    model = Gated(REACHED[name])
    exact = held_bytes(model, "eager")
    handle = approximate(model, RULE, skip_small=False)
    assert held_bytes(model, way) == held_bytes(model, "eager") <= exact / 4
    assert handle.uncovered(torch.randn(ROWS, WIDTH, requires_grad=True)) == ()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("recompute", [False, True])
def test_queries_keys_and_values_are_computed_again(recompute, way):
    model = Attention(WIDTH)
    x = torch.randn(4, ROWS, WIDTH, requires_grad=True)
    approximate(model, replace(RULE, recompute=recompute), skip_small=False)
    held = measure_held_bytes(step(model, way, x), exclude=[model, x]).storages
    assert any(storage.storage_bytes == 3 * 4 * x.numel() for storage in held) is not recompute


def named_on_the_page(start):
    """Return the functions that a sentence lists."""
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    sentence = text.split(start)[1].split(". ")[0]
    return set(re.findall(r"`((?:F|torch)\.\w+)`", sentence))


def test_the_page_lists_these_and_no_others():
    assert named_on_the_page("Functions, in eager mode and compiled: ") == {*REACHED, SDPA}
    assert named_on_the_page("In eager mode alone, since compilers take them apart: ") == set(REACHED_IN_EAGER_MODE)
    assert named_on_the_page("They may overwrite their input: ") == set(REACHED_IN_PLACE)
    left = {name.removeprefix("F.") for name in named_on_the_page("Not reached, among others: ")}
    assert left == {"logsigmoid", "softsign", "tanhshrink", "threshold"}
    assert left <= set(NOT_REACHED)
