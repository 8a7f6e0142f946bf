"""What a converted network holds is what is alive: nothing is kept out of sight of the count."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.networks import DecoderBlock, EncoderBlock
from cheapgrad import approximate, recipes
from tests.oracles.live_storages import assert_nothing_is_uncounted

WIDTH = 128


def networks():
    return {
        "encoder": nn.Sequential(*[EncoderBlock(WIDTH, 0.1) for _ in range(2)], nn.LayerNorm(WIDTH)),
        "decoder": nn.Sequential(*[DecoderBlock(WIDTH) for _ in range(2)], nn.LayerNorm(WIDTH)),
    }


@pytest.mark.parametrize("name", ["encoder", "decoder"])
@pytest.mark.parametrize("recipe", [recipes.memory(), recipes.speed(), recipes.both()], ids=["memory", "speed", "both"])
def test_nothing_is_alive_that_is_not_counted(name, recipe):
    model, x = networks()[name], torch.randn(4, 16, WIDTH)
    approximate(model, recipe, skip_small=False)

    # A stock layer at the end: the norm before it is joined by nobody.
    assert_nothing_is_uncounted(model, x, lambda: model(x).square().mean())
