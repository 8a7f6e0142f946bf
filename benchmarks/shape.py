"""Where noise points: added noise in units of AdamW's steps, entry by entry and weighed by the loss's curvature."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

import cheapgrad
from benchmarks.experiments.methods import EXACT, Method, list_methods
from benchmarks.experiments.preparing import Batch, Prepared
from benchmarks.experiments.settings import make_tasks
from benchmarks.experiments.tasks import Task
from benchmarks.experiments.training import draw_batches
from benchmarks.units import train_exactly
from cheapgrad.auditing.preconditioned_noise import SecondMoments, read_second_moments
from cheapgrad.curvature import GaussNewton

_LABELS = (
    "cotangent examples 0.1",
    "uniform masks, rows 0.5",
    "stored rows 0.5",
    "uniform masks, columns 0.5",
    "cotangent columns 0.3 (data-dependent diagonal)",
    "stored features 0.5",
    "stored features 0.3",
    "recipes.memory(2)",
)
_SHARES = (0.3, 0.7)
_BATCHES = 32
# Examples that the curvature is that of, not among those of the batches.
_EXAMPLES, _EXAMPLES_SEED = 512, 77

_Gradient = Sequence[Tensor]


def measure_shapes(*, data: Path | None) -> Iterator[dict[str, Any]]:
    """Yield one record for each perceptron, point of the training and method.

    Args:
        data: as for ``python -m benchmarks.experiments``; None for the digits.
    """
    methods = {method.label: method for method in list_methods()}
    tasks = make_tasks(() if data is None else (data,))
    for task, share in itertools.product(tasks, _SHARES):
        if "MLP" not in task.name:
            continue
        steps = round(share * task.steps)
        model, optimizer, batches = train_exactly(task, steps)
        names, parameters = zip(*model.named_parameters(), strict=True)
        noise = _Noise(
            task, model, read_second_moments(optimizer, names, parameters), list(itertools.islice(batches, _BATCHES))
        )
        for label in track(_LABELS, f"{task.name}, {steps} steps", transient=True):
            record = {"benchmark": "shape", "network": f"{task.name}, {steps} steps", "method": label}
            yield record | noise.measure(methods[label])


class _Noise:
    """Exact gradients of batches and the curvature at the weights of one training."""

    def __init__(self, task: Task, model: nn.Module, moments: SecondMoments, batches: Sequence[Batch]) -> None:
        self._task, self._model, self._moments, self._batches = task, model, moments, batches
        self._draw = Prepared(task, EXACT, model).draw_gradient
        self._divisors = [moment.read().sqrt() + moment.epsilon for moment in moments.known]
        held_out = next(draw_batches(task, _EXAMPLES, _EXAMPLES_SEED))
        self._curvature = GaussNewton(model, nn.functional.cross_entropy, held_out)
        self._exact = [self._draw(batch) for batch in batches]
        mean = [torch.stack(parts).mean(0) for parts in zip(*self._exact, strict=True)]
        errors = [[one - other for one, other in zip(gradient, mean, strict=True)] for gradient in self._exact]
        self._variance = [torch.stack(parts).double().var(0) for parts in zip(*self._exact, strict=True)]
        self._bend = self._bend_along(errors) * len(batches) / (len(batches) - 1)

    def measure(self, method: Method) -> dict[str, float]:
        rules = method.rules if method.make_rules is None else method.make_rules(self._model)
        handle = cheapgrad.approximate(self._model, rules, skip_small=self._task.skip_small)
        drawn = [self._draw(batch) for batch in self._batches]
        handle.revert()
        pairs = zip(drawn, self._exact, strict=True)
        errors = [[one - other for one, other in zip(*pair, strict=True)] for pair in pairs]
        added = [torch.stack(parts).double().square().mean(0) for parts in zip(*errors, strict=True)]
        above, below = self._moments.sum_by_steps(added, added, self._variance)
        return {
            "noise": float(sum(own.sum() for own in added) / sum(batch.sum() for batch in self._variance)),
            "by_entry": above / below,
            "by_curvature": self._bend_along(errors) / self._bend,
        }

    def _bend_along(self, errors: Sequence[_Gradient]) -> float:
        """Return the mean of ``uᵀ G u``, u an error in units of the optimizer's steps and G the Gauss-Newton matrix."""
        total = 0.0
        for error in errors:
            parts = zip(error, self._divisors, strict=True)
            step = torch.cat([(part / divisor).flatten() for part, divisor in parts]).float()
            total += float(step.double() @ (self._curvature @ step).double())
        return total / len(errors)
