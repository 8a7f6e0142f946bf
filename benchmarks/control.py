"""The controller's word: its target against noise measured by Monte Carlo all through a training, and what it costs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import cheapgrad
from benchmarks.pictures import Patches, load_patches
from benchmarks.vision_transformer import VisionTransformer
from benchmarks.watching import give_own_trial
from cheapgrad.sketch import RowSample

BATCH, TARGET, EVERY = 64, 0.05, 64
LARGEST_DEVIATION, LARGEST_OVERHEAD = 0.2, 0.02
# Two-sided 95 % of a normal.
_BAND = 1.96
# Steps after which the period between trials is at its longest, and the fixed seed of what is measured apart.
_SETTLED, _SEED = 64 * 32, 5


def measure_control(*, data: Path | None, steps: int, windows: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield ω by window of training on a transformer and a perceptron, then the time that control takes."""
    digits = _digits()
    rule = cheapgrad.Rule("blocks.*", cotangent=RowSample(0.5))
    yield from _follow("transformer, digits", _small_transformer(), rule, digits, steps, windows)
    perceptron = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    yield from _follow(
        "perceptron, digits", perceptron, cheapgrad.Rule(cotangent=RowSample(0.5)), digits, steps, windows
    )
    if data is not None:
        patches = load_patches(data)
        model = VisionTransformer(96, 3, patches.inputs.shape[1], patches.inputs.shape[2], 10, 32)
        yield from _follow(f"transformer, {patches.name}", model, rule, patches, steps, windows)
    # Last, from a seed of its own: the others are as they were before there were such units.
    torch.manual_seed(_SEED)
    yield from _follow("transformer, digits", _small_transformer(), rule, digits, steps, windows, in_steps=True)
    yield time_overhead(rounds)


def _small_transformer() -> nn.Module:
    return VisionTransformer(64, 3, 16, 4, 10, 16)


def _digits() -> Patches:
    """Return digits as 16 patches each, with noise on pixels and on 15 % of the labels: the loss stays away from 0."""
    pixels, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    generator = torch.Generator().manual_seed(1)
    images = (pixels.float() / 16 - 0.3).view(-1, 8, 8)
    patches = images.unfold(1, 2, 2).unfold(2, 2, 2).reshape(-1, 16, 4)
    flipped = torch.rand(len(labels), generator=generator) < 0.15
    labels = torch.where(flipped, torch.randint(0, 10, labels.shape, generator=generator), labels)
    return Patches("digits", patches + 0.2 * torch.randn(patches.shape, generator=generator), labels)


def _follow(
    name: str,
    model: nn.Module,
    rule: cheapgrad.Rule,
    patches: Patches,
    steps: int,
    windows: int,
    *,
    in_steps: bool = False,
) -> Iterator[dict[str, Any]]:
    """Train under control from the start; measure at every step, on batches of their own; sum up by window.

    ω of a window is the sum of the added variances at its steps over the sum of the mini-batch variances, on the
    weights of the controlled layers, at the very budgets in force, trials included; in units of AdamW's steps both are
    of gradients divided by the root of the mean second moment of their weight.
    """
    handle = cheapgrad.approximate(model, rule, skip_small=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    controller = cheapgrad.Controller(handle, TARGET, every=EVERY, optimizer=optimizer if in_steps else None)
    layers = (model.get_submodule(layer) for layer in controller.keeps)
    weights = [layer.weight for layer in layers if isinstance(layer, nn.Linear)]
    generator, seen, estimates = torch.Generator().manual_seed(_SEED), [], []
    for step in track(range(1, steps + 1), description=name, transient=True):
        factors = [_find_factor(optimizer, weight) if in_steps else 1.0 for weight in weights]
        seen.append(_measure_step(model, handle, patches, (weights, factors), generator))
        index = torch.randint(0, len(patches.labels), (BATCH,))
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(patches.inputs[index]), patches.labels[index])
        loss.backward()
        optimizer.step()
        controller.step()
        # There is none before the first look.
        estimates += [] if controller.noise is None else [controller.noise]
        if step * windows % steps < windows:
            omega, error = _ratio_of_sums(torch.tensor(seen, dtype=torch.float64))
            yield {
                "benchmark": "control",
                "method": name + ", in units of AdamW's steps" * in_steps,
                "steps": f"{step - len(seen) + 1}-{step}",
                "loss": loss.item(),
                "keep": controller.keep,
                "estimate": sum(estimates) / len(estimates) if estimates else None,
                "omega": omega,
                "low": omega - _BAND * error,
                "high": omega + _BAND * error,
                "target_low": TARGET * (1 - LARGEST_DEVIATION),
                "target_high": TARGET * (1 + LARGEST_DEVIATION),
            }
            seen, estimates = [], []
    handle.revert()


def _measure_step(
    model: nn.Module,
    handle: cheapgrad.Handle,
    patches: Patches,
    weighed: tuple[list[Tensor], list[float]],
    generator: torch.Generator,
) -> tuple[float, float]:
    """Return the added variance at the strategies in force, and the mini-batch variance, from two fresh batches."""
    in_force, random_state = handle.strategies(), torch.random.get_rng_state()
    torch.manual_seed(int(torch.randint(0, 2**31, (), generator=generator)))
    exact, added = [], 0.0
    for _ in range(2):
        index = torch.randint(0, len(patches.labels), (BATCH,))
        with handle.exact():
            exact.append(_gradient(model, patches, index, *weighed))
        handle.replace_strategies(give_own_trial(in_force, BATCH, torch.initial_seed() % 2**31))
        added += (_gradient(model, patches, index, *weighed) - exact[-1]).square().sum().item() / 2
        handle.replace_strategies(in_force)
    torch.random.set_rng_state(random_state)
    return added, (exact[0] - exact[1]).square().sum().item() / 2


def _gradient(model: nn.Module, patches: Patches, index: Tensor, weights: list[Tensor], factors: list[float]) -> Tensor:
    loss = functional.cross_entropy(model(patches.inputs[index]), patches.labels[index])
    found = zip(factors, torch.autograd.grad(loss, weights), strict=True)
    return torch.cat([factor * part.flatten() for factor, part in found])


def _find_factor(optimizer: torch.optim.AdamW, weight: Tensor) -> float:
    """Return what a weight's gradient is divided by in a step, inverted; 0 before the first one."""
    state, (_, beta) = optimizer.state.get(weight), optimizer.defaults["betas"]
    if not state:
        return 0.0
    moment = float(state["exp_avg_sq"].mean()) / (1 - beta ** float(state["step"]))
    return 1 / (math.sqrt(moment) + optimizer.defaults["eps"])


def _ratio_of_sums(pairs: Tensor) -> tuple[float, float]:
    """Return the ratio of the two sums, and its standard error by leaving out one step at a time."""
    sums, count = pairs.sum(0), len(pairs)
    left_out = sums - pairs
    ratios = left_out[:, 0] / left_out[:, 1]
    error = math.sqrt((count - 1) / count * float((ratios - ratios.mean()).square().sum()))
    return float(sums[0] / sums[1]), error


def time_overhead(rounds: int) -> dict[str, Any]:
    """Return the time of a step under control over that of one with the same budgets fixed, width 192, batch 128.

    Every kind of step is timed against a fixed one, in turn, and weighs as often as it comes in a period.
    """
    model = VisionTransformer(192, 4)
    x, y = torch.randn(128, 64, 48), torch.randint(0, 10, (128,))
    handle = cheapgrad.approximate(model, cheapgrad.Rule(cotangent=RowSample(0.5)))
    controller = cheapgrad.Controller(handle, TARGET, every=EVERY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def run(is_controlled: bool) -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if is_controlled:
            controller.step()
        return time.perf_counter() - start

    for _ in range(3):
        run(True)
    ratios: dict[str, list[float]] = {}
    kinds = [_kind_at(controller, _SETTLED + step) for step in range(EVERY)]
    places = {kind: kinds.index(kind) for kind in kinds}
    for _ in track(range(rounds), description="overhead", transient=True):
        for kind, place in places.items():
            _move_to(controller, _SETTLED + place)
            controlled = run(True)
            handle.replace_strategies({name: RowSample(keep) for name, keep in controller.keeps.items()})
            ratios.setdefault(kind, []).append(controlled / run(False))
    medians = {kind: statistics.median(values) for kind, values in ratios.items()}
    return {
        "benchmark": "control",
        "method": "overhead",
        "overhead": _mean_overhead(kinds, medians),
        # Trials are more frequent at first.
        "overhead_first_1000": _mean_overhead([_kind_at(controller, step) for step in range(1000)], medians),
        **{f"step {kind}": median for kind, median in medians.items()},
        "target_overhead": LARGEST_OVERHEAD,
    }


def _mean_overhead(kinds: Sequence[str], ratios: Mapping[str, float]) -> float:
    return sum(ratios[kind] - 1 for kind in kinds) / len(kinds)


def _move_to(controller: cheapgrad.Controller, step: int) -> None:
    controller.load_state_dict(controller.state_dict() | {"step": step})


def _kind_at(controller: cheapgrad.Controller, step: int) -> str:
    _move_to(controller, step)
    look = controller._look()
    return "plain" if look is None else look.name.lower()
