"""Seeding torch before a pass that is to repeat another, and putting its generators back afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch.random import _seed_custom_device


def seed_torch(seed: int) -> None:
    """Do what `torch.manual_seed` does on the devices in use: CPU, CUDA, XPU, MPS and a custom one.

    For a CUDA or XPU that this process has not touched yet, it writes a stack trace down, which takes as long as a
    small step, and puts the seed in the place of the one that is waiting for the device. Here that one is left alone:
    no pass has drawn there, and a user's own ``torch.manual_seed`` still holds when the device is first used. MTIA is
    left out.

    >>> seed_torch(0)
    >>> first = torch.rand(2)
    >>> _ = torch.manual_seed(0)
    >>> bool((torch.rand(2) == first).all())
    True
    """
    torch.default_generator.manual_seed(seed)
    for device in (torch.cuda, torch.xpu):
        if device.is_initialized():
            device.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
    _seed_custom_device(seed)


@contextlib.contextmanager
def torch_states_kept() -> Iterator[None]:
    """Put the generators that `seed_torch` seeds back afterwards to where they were; a custom device's is not.

    >>> with torch_states_kept():
    ...     first = torch.rand(2)
    >>> bool((torch.rand(2) == first).all())
    True
    """
    kept: list[tuple[Callable[..., None], object]] = [(torch.set_rng_state, torch.get_rng_state())]
    for device in (torch.cuda, torch.xpu):
        if device.is_initialized():
            kept.append((device.set_rng_state_all, device.get_rng_state_all()))
    if torch.backends.mps.is_available():
        kept.append((torch.mps.set_rng_state, torch.mps.get_rng_state()))
    try:
        yield
    finally:
        for set_state, state in kept:
            set_state(state)
