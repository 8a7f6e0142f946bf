"""The four networks hold as many times fewer bytes as is promised of them."""

from __future__ import annotations

import pytest
import torch

from benchmarks.networks import NETWORKS
from benchmarks.whole_network import EXACT, Method
from cheapgrad import recipes
from cheapgrad.cost import measure_held_bytes


def held(method, original, batch):
    model = method.prepare(original)
    return measure_held_bytes(lambda: method.loss(model, *batch), exclude=[model, *batch]).total_bytes


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_the_memory_recipe_reaches_its_target(network):
    torch.manual_seed(0)
    original, batch = network.make(), network.make_batch()
    # A language model's loss is one operation with its output layer, and the reference is the stock loss.
    memory = Method("memory", recipes.memory(bits=4), fused_loss="language" in network.name)
    assert held(EXACT, original, batch) / held(memory, original, batch) >= network.target_ratio
