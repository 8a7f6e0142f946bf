"""One training run, from the seed to the record."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.experiments.datasets import Split
from benchmarks.experiments.declaration import TrainingRun
from benchmarks.experiments.methods import EXACT, PLANNED_AFTER, Method
from benchmarks.experiments.noise import measure_noise
from benchmarks.experiments.preparing import Batch, Prepared, exactly, prepare
from benchmarks.experiments.tasks import Task

WEIGHT_DECAY = 0.01
WARM_UP_SHARE = 0.2
_PLANNING_BATCHES = 4
_NOISE_BATCHES = 6
_NOISE_SEED = 5000
_DRAW_SEED = 1000
_EVALUATED_AT_ONCE = 512


def draw_batches(task: Task, batch_size: int, seed: int) -> Iterator[Batch]:
    """Yield batches for ever, in an order that depends on the seed and the batch size only."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, len(task.dataset.train))
    while True:
        order = torch.randperm(len(task.dataset.train), generator=generator)
        for index in order.split(size):
            # The last, short batch of a pass is left out: all steps are then equally long.
            if len(index) == size:
                yield task.take(task.dataset.train, index)


def make_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Return the optimizer that every method uses."""
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY)


def take_exact_step(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """Take a step of a model that nothing has been applied to."""
    optimizer.zero_grad(set_to_none=True)
    task.compute_loss(model, *batch).backward()
    optimizer.step()


def train(task: Task, method: Method, run: TrainingRun) -> dict[str, Any]:
    """Train once and return curve, figures on validation and test data, times, bytes, and added variance.

    Times are those of optimizer steps: batches are made, and models evaluated, outside of them.
    """
    started = time.perf_counter()
    model = task.build_seeded(run.seed)
    planned_at = round(PLANNED_AFTER * run.steps) if method.planned_flops is not None else 0
    batches = draw_batches(task, run.batch_size, run.seed)
    planning = list(itertools.islice(draw_batches(task, run.batch_size, run.seed + 1), _PLANNING_BATCHES))
    optimizer = make_optimizer(model, run.learning_rate)
    prepared = prepare(task, EXACT if planned_at else method, model, planning, optimizer)
    state = _Progress(task, run, prepared)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, run.steps))
    torch.manual_seed(run.seed + _DRAW_SEED)
    for step in range(1, run.steps + 1):
        if planned_at and step == planned_at + 1:
            begin = time.perf_counter()
            state.prepared = prepare(task, method, model, planning, optimizer)
            state.planning_seconds = time.perf_counter() - begin
        with exactly(state.prepared) if is_exact_step(method, step, run.steps) else contextlib.nullcontext():
            is_finite = state.take_step(next(batches), optimizer)
        schedule.step()
        state.look(step)
        if not is_finite:
            break
    return state.finish(time.perf_counter() - started)


def is_exact_step(method: Method, step: int, steps: int) -> bool:
    """Return whether a method takes this step, from 1, with exact gradients although others are not.

    >>> method = Method("first fifth exact", "speed", exact_between=(0.0, 0.2))
    >>> [is_exact_step(method, step, 10) for step in (1, 2, 3, 10)]
    [True, True, False, False]
    """
    if method.exact_between is None:
        return False
    begin, end = method.exact_between
    return round(begin * steps) < step <= round(end * steps)


def rate_share(step: int, steps: int) -> float:
    """Return the learning rate of a step, from 0, as a share of its peak: a straight rise, then half a cosine.

    >>> [round(rate_share(step, 10), 2) for step in (0, 1, 5, 9)]
    [0.5, 1.0, 0.59, 0.03]
    """
    rise = max(1, round(WARM_UP_SHARE * steps))
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise + 1) / (steps - rise + 1))) / 2


class _Progress:
    """What is found out during a run."""

    def __init__(self, task: Task, run: TrainingRun, prepared: Prepared) -> None:
        self.task, self.run, self.prepared = task, run, prepared
        self.seconds = self.cpu_seconds = self.planning_seconds = 0.0
        self._losses: list[float] = []
        self._curve: list[dict[str, Any]] = []
        self._noise: list[dict[str, Any]] = []
        self._marks = _spread(run.evaluations, run.steps)
        self._noise_marks = _spread(run.noise_points, run.steps)

    def take_step(self, batch: Batch, optimizer: torch.optim.Optimizer) -> bool:
        """Take an optimizer step, and return whether the loss is finite."""
        start, cpu_start = time.perf_counter(), time.process_time()
        optimizer.zero_grad(set_to_none=True)
        loss = self.prepared.backward(batch, self.run.parts)
        optimizer.step()
        if self.prepared.controller is not None:
            self.prepared.controller.step()
        self.seconds += time.perf_counter() - start
        self.cpu_seconds += time.process_time() - cpu_start
        self._losses.append(loss)
        return math.isfinite(loss)

    def look(self, step: int) -> None:
        """Add to the curve and measure variance where it is time to."""
        if step in self._marks:
            validation = self.task.dataset.validation
            loss, accuracy = evaluate(self.prepared, _first(validation, self.task.curve_examples))
            self._curve.append(
                {
                    "step": step,
                    "seconds": self.seconds,
                    "cpu_seconds": self.cpu_seconds,
                    "training_loss": _finite(sum(self._losses) / len(self._losses)),
                    "validation_loss": loss,
                    "validation_accuracy": accuracy,
                }
            )
            self._losses.clear()
        if step in self._noise_marks and self.prepared.method.memory_budget is None:
            # Of the task's usual batch, whatever this method's is: that is what omega is a multiple of.
            batches = list(
                itertools.islice(draw_batches(self.task, self.task.batch_size, _NOISE_SEED + step), _NOISE_BATCHES)
            )
            self._noise.append({"step": step, **measure_noise(self.prepared, batches, draws=1)})

    def finish(self, total_seconds: float) -> dict[str, Any]:
        """Return the record's result."""
        validation, test = (
            evaluate(self.prepared, split) for split in (self.task.dataset.validation, self.task.dataset.test)
        )
        batch = next(draw_batches(self.task, self.run.batch_size, 0))
        held_bytes, peak_bytes = self.prepared.measure_bytes(batch, self.run.parts)
        steps = self._curve[-1]["step"] if self._curve else 0
        return {
            "training_seconds": self.seconds,
            "training_cpu_seconds": self.cpu_seconds,
            "planning_seconds": self.planning_seconds,
            "total_seconds": total_seconds,
            "held_bytes": held_bytes,
            "peak_bytes": peak_bytes,
            "validation_loss": validation[0],
            "validation_accuracy": validation[1],
            "test_loss": test[0],
            "test_accuracy": test[1],
            "is_diverged": steps < self.run.steps or test[0] is None,
            "curve": self._curve,
            "noise": self._noise,
            "remark": self.prepared.remark,
        }


@torch.no_grad()
def evaluate(prepared: Prepared, split: Split) -> tuple[float | None, float]:
    """Return mean cross-entropy (None if it is not finite) and share of right classes, in evaluation mode."""
    model = prepared.model.eval()
    total_loss, right, count = 0.0, 0, 0
    for index in torch.arange(len(split)).split(_EVALUATED_AT_ONCE):
        inputs, labels = prepared.task.take(split, index)
        scores: Tensor = model(inputs)
        flat_scores, flat_labels = scores.flatten(0, -2), labels.flatten()
        total_loss += float(nn.functional.cross_entropy(flat_scores, flat_labels, reduction="sum"))
        right += int((flat_scores.argmax(1) == flat_labels).sum())
        count += len(flat_labels)
    model.train()
    return _finite(total_loss / count), right / count


def _first(split: Split, count: int) -> Split:
    return Split(split.inputs[:count], split.labels[:count])


def _spread(points: int, steps: int) -> set[int]:
    """Return steps at equal distances, the last one among them."""
    return {max(1, round(steps * (point + 1) / points)) for point in range(points)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
