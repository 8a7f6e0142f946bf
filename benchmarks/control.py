"""The controller's word: its target against noise measured by Monte Carlo, and what it costs.

Run as ``python -m benchmarks.control``; prints one line of JSON per figure.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import cheapgrad
from benchmarks.vision_transformer import VisionTransformer
from cheapgrad.sketch import RowSample

BATCH, TARGET = 64, 0.05


def make_patches() -> tuple[Tensor, Tensor]:
    """Return digits as 16 patches each, with noise on pixels and on 15 % of the labels: the loss stays away from 0."""
    pixels, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    generator = torch.Generator().manual_seed(1)
    images = (pixels.float() / 16 - 0.3).view(-1, 8, 8)
    patches = images.unfold(1, 2, 2).unfold(2, 2, 2).reshape(-1, 16, 4)
    flipped = torch.rand(len(labels), generator=generator) < 0.15
    labels = torch.where(flipped, torch.randint(0, 10, labels.shape, generator=generator), labels)
    return patches + 0.2 * torch.randn(patches.shape, generator=generator), labels


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    loss = functional.cross_entropy(model(x), y)
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)])


def measure_noise(model: nn.Module, handle: cheapgrad.Handle, x: Tensor, y: Tensor, batches: int = 60) -> float:
    """Return added variance over mini-batch variance, by Monte Carlo on batches of their own."""
    generator, exact, added = torch.Generator().manual_seed(5), [], []
    for _ in range(batches):
        index = torch.randint(0, len(x), (BATCH,), generator=generator)
        with handle.exact():
            exact.append(_gradient(model, x[index], y[index]))
        for _ in range(3):
            added.append((_gradient(model, x[index], y[index]) - exact[-1]).square().sum())
    return float(torch.stack(added).mean() / torch.stack(exact).var(0).sum())


def follow_target(steps: int = 400, checkpoints: int = 4) -> Iterator[dict[str, Any]]:
    """Train under control; yield target, estimate and measured noise at checkpoints."""
    torch.manual_seed(0)
    x, y = make_patches()
    model = VisionTransformer(64, 3, 16, 4, 10, 16)
    handle = cheapgrad.approximate(model, cheapgrad.Rule(cotangent=RowSample(0.5)), skip_small=False)
    controller = cheapgrad.Controller(handle, TARGET, every=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, steps + 1):
        index = torch.randint(0, len(x), (BATCH,))
        optimizer.zero_grad()
        functional.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
        controller.step()
        if step % (steps // checkpoints) == 0:
            state, random_state = controller.state_dict(), torch.random.get_rng_state()
            handle.replace_strategies({name: RowSample(keep) for name, keep in controller.keeps.items()})
            yield {
                "step": step,
                "target": TARGET,
                "estimated": controller.noise,
                "measured": measure_noise(model, handle, x, y),
                "keep": controller.keep,
            }
            torch.random.set_rng_state(random_state)
            controller.load_state_dict(state)


def time_overhead(rounds: int = 3, steps: int = 32) -> dict[str, float]:
    """Return the time of a period of 32 steps under control over that with fixed budgets, width 192, batch 128."""
    torch.manual_seed(0)
    model = VisionTransformer(192, 4)
    x, y = torch.randn(128, 64, 48), torch.randint(0, 10, (128,))
    handle = cheapgrad.approximate(model, cheapgrad.Rule(cotangent=RowSample(0.5)))
    controller = cheapgrad.Controller(handle, 0.2)

    def run(is_controlled: bool) -> float:
        start = time.perf_counter()
        functional.cross_entropy(model(x), y).backward()
        if is_controlled:
            controller.step()
        return time.perf_counter() - start

    for _ in range(steps + 1):
        run(True)
    ratios = []
    for _ in range(rounds):
        controlled = fixed = 0.0
        for _ in range(steps):
            controlled += run(True)
            state = controller.state_dict()
            handle.replace_strategies({name: RowSample(keep) for name, keep in controller.keeps.items()})
            fixed += run(False)
            controller.load_state_dict(state)
        ratios.append(controlled / fixed)
    return {"overhead": statistics.median(ratios) - 1, "least": min(ratios) - 1, "most": max(ratios) - 1}


if __name__ == "__main__":
    for record in follow_target():
        print(json.dumps(record), flush=True)
    print(json.dumps(time_overhead()), flush=True)
