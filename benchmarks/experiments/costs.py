"""Time and bytes of a step of several methods, measured in turn, so that a busy machine is unfair to none."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.experiments.methods import EXACT, PLANNED_AFTER, Method
from benchmarks.experiments.preparing import Batch, Prepared, prepare
from benchmarks.experiments.tasks import Task
from benchmarks.experiments.training import draw_batches, make_optimizer, rate_share, take_exact_step
from cheapgrad.errors import CheapgradError

# Shares of the usual batch whose exact steps are timed, to read off equal step times.
LADDER = (0.125, 0.25, 0.5, 0.75, 1.0)
_WARM_UP_ROUNDS = 2
_PLANNING_BATCHES = 4


@dataclass
class _Stepper:
    """A method that takes timed steps.

    Attributes:
        prepared: the model and its method.
        batch: the same in every step.
        optimizer: of the model.
        seconds: of forward, backward and update, one triple for each step that counts.
    """

    prepared: Prepared
    batch: Batch
    optimizer: torch.optim.Optimizer
    seconds: list[tuple[float, float, float]] = field(default_factory=list)

    def step(self, is_counted: bool) -> None:
        """Take a step."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.prepared.compiler_budget():
            start = time.perf_counter()
            loss = self.prepared.compute_loss(self.batch)
            middle = time.perf_counter()
            loss.backward()
            late = time.perf_counter()
        self.optimizer.step()
        if is_counted:
            self.seconds.append((middle - start, late - middle, time.perf_counter() - late))


def measure_costs(task: Task, methods: Sequence[Method], rounds: int, seed: int) -> dict[str, Any]:
    """Return times and bytes of a step of each method, and the times of exact steps on smaller batches.

    Args:
        task: the task.
        methods: what to measure; the exact method is measured in any case.
        rounds: timed steps of each; in every round all methods take one, each time in another order.
        seed: of weights and batch.

    Returns:
        By method: medians of the times and of their ratios to the exact step of the same round, half the distance
        between the quartiles of the ratios, bytes; of an adaptive method bytes alone; a method that does not fit the
        network has an ``"error"`` instead.
    """
    batch = next(draw_batches(task, task.batch_size, seed))
    steppers: dict[str, _Stepper] = {}
    results: dict[str, dict[str, Any]] = {}
    for method in (EXACT, *[method for method in methods if method.step_words != EXACT.step_words]):
        try:
            steppers[method.step_words] = _make_stepper(task, method, batch, seed)
            held_bytes, peak_bytes = steppers[method.step_words].prepared.measure_bytes(batch)
        except CheapgradError as error:
            results[method.step_words] = {"error": f"{type(error).__name__}: {error}"}
            steppers.pop(method.step_words, None)
            continue
        results[method.step_words] = {"held_bytes": held_bytes, "peak_bytes": peak_bytes}
        if method.is_adaptive:
            # The first steps of a controller are all trials: trainings tell what they take.
            steppers.pop(method.step_words)
    sizes = sorted({max(2, round(share * task.batch_size)) for share in LADDER})
    ladder = {size: _make_stepper(task, EXACT, _first(batch, size), seed) for size in sizes}
    _take_turns([*steppers.values(), *ladder.values()], rounds)
    reference = [sum(parts) for parts in steppers[EXACT.step_words].seconds]
    for words, stepper in steppers.items():
        results[words] |= _summarise(stepper, reference, steppers[EXACT.step_words])
    return {
        "methods": results,
        "ladder": [[size, _summarise(stepper, reference, None)["ratio"]] for size, stepper in ladder.items()],
    }


def _make_stepper(task: Task, method: Method, batch: Batch, seed: int) -> _Stepper:
    model = task.build_seeded(seed)
    planning = list(itertools.islice(draw_batches(task, task.batch_size, seed), _PLANNING_BATCHES))
    optimizer = make_optimizer(model, 1e-4)
    if method.planned_flops is not None:
        _train_until_planned(task, model, optimizer, seed)
    return _Stepper(prepare(task, method, model, planning, optimizer), batch, optimizer)


def _train_until_planned(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Take the exact steps that come before planning, at the rate in the middle of those to choose from.

    The gradient of a model that has learned nothing is in other places, and so would be the plan.
    """
    rate = task.learning_rates[len(task.learning_rates) // 2]
    steps = max(1, round(PLANNED_AFTER * task.steps))
    batches = draw_batches(task, task.batch_size, seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * rate_share(step, task.steps)
        take_exact_step(task, model, optimizer, next(batches))
    optimizer.param_groups[0]["lr"] = 1e-4


def _first(batch: Batch, count: int) -> Batch:
    return batch[0][:count].clone(), batch[1][:count].clone()


def _take_turns(steppers: list[_Stepper], rounds: int) -> None:
    order, shuffle = list(steppers), random.Random(0).shuffle
    for current in range(rounds + _WARM_UP_ROUNDS):
        shuffle(order)
        for stepper in order:
            stepper.step(current >= _WARM_UP_ROUNDS)


def _summarise(stepper: _Stepper, reference: Sequence[float], exact: _Stepper | None) -> dict[str, Any]:
    totals = [sum(parts) for parts in stepper.seconds]
    ratios = [total / base for total, base in zip(totals, reference, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    result = {
        "seconds": statistics.median(totals),
        "ratio": statistics.median(ratios),
        "ratio_spread": (high - low) / 2,
        "forward_seconds": statistics.median(parts[0] for parts in stepper.seconds),
        "backward_seconds": statistics.median(parts[1] for parts in stepper.seconds),
    }
    if exact is not None:
        pairs = zip(stepper.seconds, exact.seconds, strict=True)
        result["backward_ratio"] = statistics.median(ours[1] / theirs[1] for ours, theirs in pairs)
    return result
