"""Seeding: the draws of `torch.manual_seed`, and nothing of devices that nobody uses yet."""

from __future__ import annotations

import pytest
import torch

from cheapgrad.seeding import seed_torch, torch_states_kept


@pytest.mark.parametrize("seed", [0, 7, 2**62])
def test_draws_are_those_after_manual_seed(seed: int) -> None:
    torch.manual_seed(seed)
    expected = torch.rand(5), torch.randn(3), torch.randperm(9)
    torch.rand(11)
    seed_torch(seed)
    for draw, first in zip((torch.rand(5), torch.randn(3), torch.randperm(9)), expected, strict=True):
        assert torch.equal(draw, first)


@pytest.mark.parametrize("name", ["cuda", "xpu"])
def test_devices_in_use_are_seeded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # No such device is needed to see that it would be seeded: its generator is stood in for by one on the CPU.
    generator, device = torch.Generator(), getattr(torch, name)
    monkeypatch.setattr(device, "is_initialized", lambda: True)
    monkeypatch.setattr(device.random, "device_count", lambda: 1)
    monkeypatch.setattr(device, "default_generators", (generator,))
    seed_torch(41)
    assert generator.initial_seed() == 41


@pytest.mark.parametrize("name", ["cuda", "xpu"])
def test_devices_in_use_are_put_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device, states = getattr(torch, name), [torch.tensor([4, 2])]
    monkeypatch.setattr(device, "is_initialized", lambda: True)
    monkeypatch.setattr(device, "get_rng_state_all", lambda: list(states))
    monkeypatch.setattr(device, "set_rng_state_all", lambda given: states.__setitem__(slice(None), given))
    with torch_states_kept():
        expected, states[0] = torch.rand(3), torch.tensor([0, 0])
    assert states[0].tolist() == [4, 2]
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", ["cuda", "xpu"])
def test_seed_that_waits_for_a_device_is_left_alone(name: str) -> None:
    device = getattr(torch, name)
    if device.is_initialized():
        pytest.skip(f"{name} is in use")
    torch.manual_seed(5)
    waiting = device._lazy_seed_tracker.get_calls()
    seed_torch(6)
    assert device._lazy_seed_tracker.get_calls() is waiting
