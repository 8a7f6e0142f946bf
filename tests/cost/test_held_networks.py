"""Bytes held by whole networks, against what is alive after the forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cheapgrad
from cheapgrad.cost import peak_memory
from tests.cost.models import Checkpointed, Shared, TinyBert, make_batch, make_network
from tests.oracles.live_storages import LiveStorages

CASES = {
    "network": make_network,
    "encoder": lambda: (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(2, 5, 16)),
    "lstm": lambda: (nn.LSTM(5, 7, batch_first=True), torch.randn(3, 6, 5)),
    "gru": lambda: (nn.GRU(5, 7), torch.randn(6, 3, 5)),
    "shared": lambda: (Shared(), torch.randn(4, 8)),
    "checkpoint": lambda: (Checkpointed("method", False), torch.randn(4, 16)),
    "attention": lambda: (TinyBert(), make_batch()["input_ids"]),
}


def add_up(output):
    """Return one number of everything in an output, as a loss that saves nothing."""
    tensors = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else [output]
    flat = [tensor for value in tensors for tensor in (value if isinstance(value, tuple) else [value])]
    return sum(tensor.sum() for tensor in flat)


@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_held_bytes_are_those_alive_after_forward(make):
    model, x = make()
    with LiveStorages() as storages:
        # A copy, so that the batch is alive only if it is held.
        batch = x.clone()
        loss = add_up(model(batch))
        del batch
        alive = storages.live_bytes(without=[loss, x, *model.parameters(), *model.buffers()])
    assert cheapgrad.scan(model, x, loss=add_up).total.saved_bytes == alive


def test_peak_holds_what_is_held_and_more():
    model, picture = make_network()

    def step():
        model(picture).sum().backward()

    held = cheapgrad.scan(model, picture).total.saved_bytes - picture.nbytes
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    peak = peak_memory(step)
    assert (peak.source, peak.device) == ("tracked", "cpu")
    assert held < peak.peak_bytes
    assert peak.peak_bytes < 3 * (held + gradients)
    assert peak.to_dict() == {"peak_bytes": peak.peak_bytes, "source": "tracked", "device": "cpu"}


def test_peak_counts_what_is_alive_at_once():
    def step():
        first = torch.ones(1000)
        second = first + 1
        del first
        third = second.view(10, 100) * 2
        return third[0]

    # Two storages of 4000 bytes are alive at once, never three; views are no storages.
    assert peak_memory(step).peak_bytes == 8000


def test_peak_of_a_step_in_place():
    outside = torch.ones(1000)
    assert peak_memory(lambda: outside.mul_(2).add_(1)).peak_bytes == 0


@pytest.mark.gpu
def test_peak_on_the_gpu_is_the_allocators():
    x = torch.ones(1 << 20, device="cuda")
    peak = peak_memory(lambda: (x * 2).sum())
    assert peak.source == "allocator"
    assert 4 << 20 <= peak.peak_bytes < 8 << 20
