"""Added noise as an optimizer sees it: in units of each parameter's own step, and as it stands."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

import cheapgrad
from benchmarks.experiments.datasets import load
from benchmarks.experiments.tasks import Task, make_full_tasks, make_quick_tasks
from benchmarks.experiments.training import draw_batches, make_optimizer, rate_share
from cheapgrad import recipes
from cheapgrad.sketch import RowSample, Uniform

# Points of an exact training at which noise is measured, as shares of its steps.
_POINTS = (0.3, 0.7)
_BATCH_SEED, _DRAW_SEED = 5000, 3000


@dataclass(frozen=True)
class WeighedNoise:
    """Added variance ÷ mini-batch variance, over all parameters.

    Attributes:
        omega: every entry alike, as `cheapgrad.audit` reports it.
        omega_adamw: every entry divided by its mean square, which AdamW keeps a running mean of.
        largest: place of the tensor that has most of the mini-batch variance.
        its_share: of the mini-batch variance.
        omega_of_others: omega over all other tensors.
    """

    omega: float
    omega_adamw: float
    largest: int
    its_share: float
    omega_of_others: float


def weigh_noise(
    mini_batch: Sequence[Tensor], added: Sequence[Tensor], second_moments: Sequence[Tensor], epsilon: float
) -> WeighedNoise:
    r"""Weigh variances by entry as AdamW weighs gradients: ``ω_A = Σ sᵢ/dᵢ² ÷ Σ σᵢ²/dᵢ²``, ``dᵢ = √(vᵢ + sᵢ) + ε``.

    A step of AdamW moves entry i by its gradient over ``√v + ε``. In a training with the noise, v has the added
    variance in it.

    Args:
        mini_batch: σᵢ², variance of the exact gradient of a mini-batch, by parameter tensor.
        added: sᵢ, variance that the method adds, in the same shapes.
        second_moments: vᵢ, mean square of the exact gradient of a mini-batch.
        epsilon: ε of the optimizer.
    """
    totals = torch.stack([part.double().sum() for part in mini_batch])
    extra = torch.stack([part.double().sum() for part in added])
    largest = int(totals.argmax())
    weighed_added = weighed_batch = 0.0
    for batch, more, moment in zip(mini_batch, added, second_moments, strict=True):
        weight = ((moment.double() + more.double()).sqrt() + epsilon).square().reciprocal()
        weighed_added += float((more * weight).sum())
        weighed_batch += float((batch * weight).sum())
    return WeighedNoise(
        omega=float(extra.sum() / totals.sum()),
        omega_adamw=weighed_added / weighed_batch,
        largest=largest,
        its_share=float(totals[largest] / totals.sum()),
        omega_of_others=float((extra.sum() - extra[largest]) / (totals.sum() - totals[largest])),
    )


def measure_optimizer_noise(*, data: Path | None, batches: int, draws: int) -> Iterator[dict[str, Any]]:
    """Train each network of the experiments exactly, and yield one record per method at two points of the training.

    The learning rate is the middle one of those that the experiments choose from.
    """
    tasks = make_quick_tasks(load(None), load(None))[:2] if data is None else make_full_tasks(load(data))
    for task in tasks:
        yield from _measure_task(task, batches, draws)


def _measure_task(task: Task, batches: int, draws: int) -> Iterator[dict[str, Any]]:
    model = task.build_seeded(0)
    optimizer = make_optimizer(model, task.learning_rates[1])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, task.steps))
    training = draw_batches(task, task.batch_size, 0)
    marks = {max(1, round(share * task.steps)): share for share in _POINTS}
    for step in track(range(1, max(marks) + 1), f"training exactly, {task.name}"):
        optimizer.zero_grad(set_to_none=True)
        task.compute_loss(model, *next(training)).backward()
        optimizer.step()
        schedule.step()
        if step in marks:
            yield from _measure_point(task, model, optimizer, step, batches, draws)


def _measure_point(
    task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, batches: int, draws: int
) -> Iterator[dict[str, Any]]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    group = optimizer.param_groups[0]
    chosen = list(itertools.islice(draw_batches(task, task.batch_size, _BATCH_SEED + step), batches))

    def differentiate(batch: tuple[Tensor, Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(task.compute_loss(model, *batch), parameters))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_DRAW_SEED)
        exact = [differentiate(batch) for batch in chosen]
        mini_batch = [torch.stack(parts).var(0) for parts in zip(*exact, strict=True)]
        # At these weights: the optimizer's own is of steps that are past, and of other weights.
        moments = [torch.stack(parts).square().mean(0) for parts in zip(*exact, strict=True)]
        for name, rules in _methods().items():
            handle = cheapgrad.approximate(model, rules, skip_small=task.skip_small)
            added = [torch.zeros_like(parameter) for parameter in parameters]
            for batch, gradient in zip(chosen, exact, strict=True):
                for _ in range(draws):
                    for total, drawn, true in zip(added, differentiate(batch), gradient, strict=True):
                        total += (drawn - true).square() / (batches * draws)
            handle.revert()
            found = weigh_noise(mini_batch, added, moments, group["eps"])
            yield {
                "benchmark": "optimizer_noise",
                "task": task.name,
                "step": step,
                "rate": group["initial_lr"],
                "method": name,
                "omega": found.omega,
                "omega_adamw": found.omega_adamw,
                "times": found.omega_adamw / found.omega if found.omega > 0 else math.nan,
                "largest": names[found.largest],
                "its_share": found.its_share,
                "omega_of_others": found.omega_of_others,
            }


def _methods() -> dict[str, tuple[cheapgrad.Rule, ...]]:
    return {
        "recipes.speed(0.5)": recipes.speed(0.5),
        "recipes.speed(0.3)": recipes.speed(0.3),
        "uniform masks, rows 0.5": (cheapgrad.Rule("*", cotangent=RowSample(0.5, scores=Uniform())),),
        "recipes.memory(4)": recipes.memory(4),
        "recipes.memory(2)": recipes.memory(2),
    }
