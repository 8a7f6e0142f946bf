"""What compilers and checkpoints do to random draws when nobody looks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cheapgrad import Rule, approximate
from cheapgrad.sketch import (
    ExampleSample,
    FeatureSample,
    LowRank,
    Pivotal,
    RowSample,
    StochasticRounding,
    Uniform,
    _codes,
)
from tests.contexts.checks import check_draws
from tests.contexts.layers import CONVOLUTION_2D, LINEAR, SEQUENCE, SIZE
from tests.contexts.runners import converted_model, draws_of
from tests.contexts.table import Row
from tests.placements import Placement

BACKENDS = ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow))


def largest_bias(run, count=300):
    """Return the largest z-score of a group's mean rounding error, by groups of 64 stored entries.

    The cotangent is the identity, so that dW is what was decoded.
    """
    torch.manual_seed(6)
    x = torch.randn(64, 64)
    layer = nn.Linear(64, 64, bias=False)
    approximate(layer, Rule(stored=StochasticRounding(4)), skip_small=False)
    function = run(layer)
    errors = []
    for _ in range(count):
        layer.weight.grad = None
        function(x).backward(torch.eye(64))
        errors.append((layer.weight.grad - x).mean(1))
    errors = torch.stack(errors).double()
    return float((errors.mean(0) / (errors.std(0) / count**0.5)).abs().max())


def test_codes_are_unbiased_in_eager():
    assert largest_bias(lambda layer: layer) < 5


@pytest.mark.slow
def test_codes_are_unbiased_when_compiled():
    # Casts to bfloat16 and back may be elided: codes are then made with another step than is kept, 0.2 % away.
    assert largest_bias(lambda layer: torch.compile(layer, fullgraph=True)) < 5


def test_a_step_other_than_the_one_kept_would_be_seen(monkeypatch):
    monkeypatch.setattr(_codes, "_round_down", lambda values: values)
    assert largest_bias(lambda layer: layer) > 10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "placement",
    [
        Placement(stored=RowSample(0.9)),
        Placement(stored=RowSample(0.75, Uniform(), Pivotal())),
        Placement(stored=FeatureSample(0.9)),
        Placement(stored=ExampleSample(0.5)),
    ],
    ids=lambda placement: placement.name,
)
def test_compiled_backward_never_draws_again(placement, backend):
    # The norms of the rows are fewer bytes than the kept indices: a partitioner left alone keeps those and draws again.
    for layer in (SEQUENCE,) if backend == "inductor" else (LINEAR, SEQUENCE, CONVOLUTION_2D):
        row = Row(layer, placement)
        model = converted_model(row, "cpu")
        torch._dynamo.reset()
        check_draws(row, draws_of(row, "cpu", model, torch.compile(model, backend=backend, fullgraph=True))(64))


@pytest.mark.parametrize("placement", [Placement(stored=RowSample(0.75)), Placement(stored=StochasticRounding(4))])
def test_a_checkpoint_inside_a_compiled_graph_draws_alike_twice(placement):
    row = Row(LINEAR, placement)
    model = converted_model(row, "cpu")
    compiled = torch.compile(lambda x: checkpoint(model, x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    check_draws(row, draws_of(row, "cpu", model, compiled)(64))


def test_a_small_memory_budget_does_not_make_backward_draw_again(monkeypatch):
    import torch._functorch.config as functorch_config

    row = Row(SEQUENCE, Placement(stored=RowSample(0.75)))
    model = converted_model(row, "cpu")
    with functorch_config.patch(activation_memory_budget=0.3):
        check_draws(row, draws_of(row, "cpu", model, torch.compile(model, backend="aot_eager", fullgraph=True))(64))


class Projections(nn.Module):
    """Three layers that read the same input, as queries, keys and values do."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(SIZE, SIZE, bias=False) for _ in range(3)])

    def forward(self, x):
        return sum(layer(x) for layer in self.layers)


@pytest.mark.parametrize(
    "placement",
    [
        Placement(cotangent=RowSample(0.5)),
        Placement(stored=RowSample(0.5)),
        Placement(stored=StochasticRounding(4)),
    ],
    ids=lambda placement: placement.name,
)
@pytest.mark.parametrize("backend", ["eager mode", *BACKENDS])
def test_layers_that_read_the_same_input_draw_apart(placement, backend):
    # A compiler that merged equal-looking draws would give all three the same sample: the errors would add up.
    torch.manual_seed(8)
    model = Projections()
    approximate(model, placement.rule(), skip_small=False)
    function = model if backend == "eager mode" else torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(64, SIZE)
    cotangent = torch.randn(64, SIZE)
    exact = cotangent.mT @ x
    errors = []
    for _ in range(60):
        model.zero_grad()
        function(x).backward(cotangent)
        errors.append(torch.stack([(layer.weight.grad - exact).flatten() for layer in model.layers]))
    assert all(not torch.equal(draw[0], draw[1]) and not torch.equal(draw[1], draw[2]) for draw in errors)
    stacked = torch.stack(errors).transpose(0, 1).flatten(1)
    correlation = torch.corrcoef(stacked)
    # 60 draws of errors that live in some dozens of dimensions; merged draws give exactly 1.
    assert (correlation - torch.eye(3)).abs().max() < 0.15


STORED = (RowSample(0.5), LowRank(8, refresh=3), StochasticRounding(4))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("stored", STORED, ids=repr)
def test_dropout_behind_a_layer_keeps_its_mask_in_a_checkpoint(stored, use_reentrant):
    # The second forward has to draw as much as the first, or dropout's mask differs between output and gradient.
    block = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Dropout(0.5))
    approximate(block, Rule("0", stored=stored), skip_small=False)
    x, cotangent = torch.randn(16, SIZE, requires_grad=True), torch.randn(16, SIZE)
    for _ in range(5):
        x.grad = None
        output = checkpoint(block, x, use_reentrant=use_reentrant)
        output.backward(cotangent)
        mask = (output != 0) * 2.0
        torch.testing.assert_close(x.grad, (cotangent * mask) @ block[0].weight.detach())


def test_blocks_in_reentrant_checkpoints_draw_apart():
    model = nn.Sequential(*[nn.Linear(SIZE, SIZE, bias=False) for _ in range(3)])
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.eye(SIZE))
    approximate(model, Rule(stored=RowSample(0.5, Uniform())), skip_small=False)
    x = torch.eye(SIZE, requires_grad=True)
    seen = set()
    for _ in range(4):
        model.zero_grad()
        y = x
        for layer in model:
            y = checkpoint(layer, y, use_reentrant=True)
        y.backward(torch.eye(SIZE))
        seen.update(tuple((layer.weight.grad.diagonal() != 0).tolist()) for layer in model)
    assert len(seen) == 12, "every block of every step has a sample of its own"


def test_nothing_is_drawn_in_inference_mode_or_for_a_frozen_weight():
    layer = nn.Linear(SIZE, SIZE)
    approximate(layer, Rule(stored=RowSample(0.5)), skip_small=False)
    layer.requires_grad_(False)
    state = torch.get_rng_state()
    with torch.no_grad():
        layer(torch.ones(8, SIZE))
    layer.requires_grad_(True)
    with torch.inference_mode():
        layer(torch.ones(8, SIZE))
    assert torch.equal(torch.get_rng_state(), state)
