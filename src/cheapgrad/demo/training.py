"""Training one network by one method."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from cheapgrad.demo.data import Digits
from cheapgrad.demo.methods import Method
from cheapgrad.demo.setups import Setup

# The sketches' draws start from here, so that they do not depend on how many numbers the initialisation took.
_DRAW_SEED_OFFSET = 1000


def make_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor, Tensor], None]:
    """Return one training step: a function of pictures and classes."""

    def step(pictures: Tensor, classes: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        compute_loss(model, pictures, classes).backward()
        optimizer.step()

    return step


def make_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Return the optimizer that every method uses."""
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)


def compute_loss(model: nn.Module, pictures: Tensor, classes: Tensor) -> Tensor:
    """Return the mean cross-entropy."""
    return functional.cross_entropy(model(pictures), classes)


def train(setup: Setup, method: Method, data: Digits, seed: int, steps: int | None = None) -> nn.Module:
    """Train a freshly initialised network and return it.

    Args:
        setup: the network and how it is trained.
        method: how its gradient is computed.
        data: the pictures.
        seed: of initialisation, order of the examples and draws; methods with equal batches see equal batches.
        steps: how many steps, if not those of the setup; the schedule stays that of the setup.
    """
    model = setup.build_seeded(seed).train()
    method.convert(model)
    optimizer = make_optimizer(model, setup.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, setup.learning_rate, total_steps=setup.steps, pct_start=0.2
    )
    step = make_step(model, optimizer)
    batches = data.batches(method.batch_size or setup.batch_size, seed)
    torch.manual_seed(seed + _DRAW_SEED_OFFSET)
    for _ in range(setup.steps if steps is None else min(steps, setup.steps)):
        step(*next(batches))
        schedule.step()
    return model


def measure_accuracy(model: nn.Module, data: Digits) -> float:
    """Return the share of test pictures that the network, in evaluation mode, puts into the right class."""
    with torch.no_grad():
        chosen = model.eval()(data.test_pictures).argmax(1)
    return float((chosen == data.test_classes).double().mean())
