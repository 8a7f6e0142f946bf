"""Seeding torch before a pass that is to repeat another."""

from __future__ import annotations

import torch


def seed_torch(seed: int) -> None:
    """Do what `torch.manual_seed` does on the devices in use.

    For others it writes a stack trace down, which takes as long as a small step.

    >>> seed_torch(0)
    >>> first = torch.rand(2)
    >>> _ = torch.manual_seed(0)
    >>> bool((torch.rand(2) == first).all())
    True
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
