"""Which networks are trained, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from cheapgrad.demo.models import DigitsMLP, DigitsViT


@dataclass(frozen=True)
class Setup:
    """A network and how it is trained, the same for every method.

    Attributes:
        name: of the network.
        description: its architecture in words.
        build: makes it, from torch's random state; can be pickled.
        batch_size: examples in a step of the exact method and of the strategies.
        steps: optimizer steps, the same for every method.
        learning_rate: peak of the one-cycle schedule of AdamW.
        audit_batch_size: examples in the fixed batch on which variance and bias are measured.
    """

    name: str
    description: str
    build: Callable[[], nn.Module]
    batch_size: int
    steps: int
    learning_rate: float
    audit_batch_size: int

    def build_seeded(self, seed: int) -> nn.Module:
        """Return the network that belongs to a seed."""
        torch.manual_seed(seed)
        return self.build()


SETUPS = (
    Setup(
        name="DigitsViT",
        description="vision transformer, 16 tokens, width 128, depth 2",
        build=DigitsViT,
        batch_size=64,
        steps=90,
        learning_rate=3e-3,
        audit_batch_size=16,
    ),
    Setup(
        name="DigitsMLP",
        description="perceptron 64 – 512 – 512 – 10 with GELU",
        build=DigitsMLP,
        batch_size=256,
        steps=60,
        learning_rate=1e-2,
        audit_batch_size=64,
    ),
)


# Only a step of it is timed: it would take too long to train, but this is where time is worth saving.
WIDE = Setup(
    name="wide DigitsViT",
    description="vision transformer, 16 tokens, width 384, depth 1",
    build=partial(DigitsViT, width=384, depth=1, heads=6),
    batch_size=64,
    steps=0,
    learning_rate=1e-3,
    audit_batch_size=0,
)


def make_quick(setup: Setup) -> Setup:
    """Return the setup with a few steps only, to see that everything works."""
    return replace(setup, steps=20)
