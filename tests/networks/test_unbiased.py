"""Gradients of whole networks under the recipes are unbiased, with a stated power; biased twins of them are found."""

from __future__ import annotations

import pytest
import torch

from benchmarks.networks import BagNet, Encoder, LanguageModel, loss_of
from benchmarks.vision_transformer import VisionTransformer
from cheapgrad import approximate, audit, recipes
from tests.networks.twins import leave_weights_out, use_one_code_twice

#: Network, inputs and shape of the labels, draws, and the error of scale that these draws would show.
NETWORKS = {
    "vision transformer": (
        lambda: VisionTransformer(64, 2, tokens=16, patch=12),
        lambda: torch.randn(8, 16, 12),
        (8,),
        64,
        0.05,
    ),
    # With its dropout, whose masks are part of what is drawn.
    "encoder": (lambda: Encoder(64, 2, 50, 16), lambda: torch.randint(0, 50, (8, 16)), (8,), 64, 0.1),
    "language model": (
        lambda: LanguageModel(64, 2, 50, 16),
        lambda: torch.randint(0, 50, (8, 16)),
        (8, 16),
        64,
        0.02,
    ),
    "BagNet": (lambda: BagNet(width=8), lambda: torch.randn(16, 3, 8, 8), (16,), 32, 0.1),
}


def audited(name, rules, draws):
    make, draw_inputs, shape, *_ = NETWORKS[name]
    torch.manual_seed(0)
    # One class for all: a gradient that the examples agree on shows its bias in few draws.
    model, inputs, labels = make(), draw_inputs(), torch.zeros(shape, dtype=torch.long)
    handle = approximate(model, rules, skip_small=False)
    assert sum(row.status == "converted" for row in handle.rows) >= 11
    return audit(
        model,
        lambda model, batch: loss_of(model, *batch),
        (inputs, labels),
        draws=draws,
        seed=0,
        split=False,
        progress=False,
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_and_codes_together_are_unbiased(name):
    *_, draws, within = NETWORKS[name]
    report = audited(name, recipes.both(bits=4, keep=0.5), draws)
    report.assert_unbiased(within=within)
    assert report.relative_variance > 0.01, "nothing is vacuous"


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_leaves_the_weights_out_is_found(name, monkeypatch):
    leave_weights_out(monkeypatch)
    report = audited(name, recipes.both(bits=4, keep=0.5), 8)
    assert not report.unbiased
    assert report.scale == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("is_twin", [False, True], ids=["two codes", "one code twice"])
def test_the_two_codes_of_norms_are_needed_and_enough(is_twin, monkeypatch):
    if is_twin:
        use_one_code_twice(monkeypatch)
    report = audited("vision transformer", recipes.memory(bits=2), 48)
    assert report.unbiased != is_twin
    assert report.detectable_relative_bias < 0.02
