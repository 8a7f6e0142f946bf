"""What follows from the records of a task: shares of time and bytes, paired differences, steps to a target."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.experiments.matching import find_time
from benchmarks.experiments.methods import RULER_BY, SMALLER_BY
from benchmarks.experiments.results import Row, TaskResults
from benchmarks.experiments.statistics import Comparison, compare_paired, correct_for_many, summarise
from cheapgrad.planning import tradeoff

# The target of a seed: the loss on validation data that its exact training has after this share of its steps.
TARGET_SHARE = 0.6


@dataclass(frozen=True)
class Reach:
    """Steps to the target loss.

    Attributes:
        ratios: steps of the method, divided by those of the exact training of the same seed, where it reached the
            target.
        times: the same for the time.
        seeds: that were compared.
        limit: the ratio that cannot be measured any more: all steps of the method, divided by those of exact training
            to the target.
        predicted: ratio by the bound, at the measured omega and the mini-batch noise of exact training; exact steps
            add no variance.
        noise_dominated: ratio where noise decides, ``1 + ω``.
    """

    ratios: dict[int, float]
    times: dict[int, float]
    seeds: tuple[int, ...]
    limit: float
    predicted: float | None
    noise_dominated: float | None

    @property
    def steps_ratio(self) -> float | None:
        """Mean over the seeds; None where one did not reach the target: those that did would flatter."""
        return self._average(self.ratios)

    @property
    def time_ratio(self) -> float | None:
        """The same for the time."""
        return self._average(self.times)

    def _average(self, values: dict[int, float]) -> float | None:
        return summarise(list(values.values()))[0] if values and len(values) == len(self.seeds) else None


def metric_of(results: TaskResults) -> str:
    """Return the figure that counts."""
    return "test_loss" if results.is_text else "test_accuracy"


def compare_rows(results: TaskResults, row: Row, other: Row, figure: str = "") -> Comparison | None:
    """Return row − other, paired by seed; accuracies in points. None without common seeds.

    Args:
        results: of the task.
        row: a method.
        other: what it is compared with.
        figure: of the result; the one that counts by default.
    """
    name = figure or metric_of(results)
    scale = 100.0 if name.endswith("accuracy") else 1.0
    first = {seed: scale * value for seed, value in row.collect(name).items()}
    second = {seed: scale * value for seed, value in other.collect(name).items()}
    return compare_paired(first, second) if set(first) & set(second) else None


def list_distinct(rows: Iterable[Row]) -> list[Row]:
    """Return the rows that were trained, of those that share their runs the first."""
    distinct: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row.runs:
            distinct.setdefault(row.run_ids, row)
    return list(distinct.values())


def compare_all(results: TaskResults) -> dict[tuple[str, bool], tuple[Comparison, float]]:
    """Return for every method its difference to exact training, and Holm's p-value over all methods of the task.

    Rows that share their runs are one method, and count once; a ruler is no method.
    """
    found = {
        (row.label, row.is_tuned): comparison
        for row in list_distinct(results.rows)
        if row is not results.exact
        and not row.is_ruler
        and (comparison := compare_rows(results, row, results.exact)) is not None
    }
    adjusted = correct_for_many({repr(key): comparison.p_value for key, comparison in found.items()})
    return {key: (comparison, adjusted[repr(key)]) for key, comparison in found.items()}


def time_share(results: TaskResults, row: Row) -> float | None:
    """Return the time of the whole training, divided by that of exact training.

    By the measured step times where a step is the usual one, or an exact one on another batch; where it is neither, or
    what it costs depends on the state of the training, by processor seconds of the runs themselves, paired by seed.
    Processor seconds that went into a plan are added.
    """
    steps = steps_share(results, row)
    return None if steps is None else steps + planning_share(results, row)


def is_shorter(row: Row) -> bool:
    """Tell whether a row is exact training of fewer steps."""
    return row.match_by == "time, steps" or row.match_by.startswith(RULER_BY)


def has_smaller_batch(row: Row) -> bool:
    """Tell whether a row is exact training of as many steps on smaller batches."""
    return row.match_by == "time, batch" or row.match_by.startswith(SMALLER_BY)


def steps_share(results: TaskResults, row: Row) -> float | None:
    """Return the time of all steps, divided by that of exact training."""
    if row.costs is not None and "ratio" in row.costs:
        return row.exact_share + (1 - row.exact_share) * row.costs["ratio"]
    is_exact = has_smaller_batch(row) or is_shorter(row) or row.match_by == "bytes, batch"
    if is_exact and row.runs and results.exact.runs:
        is_usual = row.declaration["batch_size"] == results.exact.declaration["batch_size"]
        step = 1.0 if is_usual else find_time(row.declaration["batch_size"], row.ladder)
        if step is not None:
            return step * row.declaration["steps"] / results.exact.declaration["steps"]
    return _share(row, "training_cpu_seconds", results.exact, "training_cpu_seconds")


def planning_share(results: TaskResults, row: Row) -> float:
    """Return the processor seconds of planning, divided by those of the steps of exact training."""
    return _share(row, "planning_seconds", results.exact, "training_cpu_seconds") or 0.0


def bytes_share(results: TaskResults, row: Row) -> float | None:
    """Return bytes held for backward, divided by those of exact training on the usual batch."""
    return _share(row, "held_bytes", results.exact, "held_bytes")


def _share(row: Row, figure: str, other: Row, other_figure: str) -> float | None:
    ours, others = row.collect(figure), other.collect(other_figure)
    seeds = set(ours) & set(others)
    return summarise([ours[seed] / others[seed] for seed in sorted(seeds)])[0] if seeds else None


def find_rivals(results: TaskResults, row: Row) -> list[Row]:
    """Return the exact methods that were made equal to this one, those with the learning rate of the same pass."""
    return [
        rival
        for rival in results.rows
        if rival.match_label == row.label
        and rival.runs
        and rival.is_tuned == row.is_tuned
        and "larger" not in rival.match_by
        and not rival.is_ruler
    ]


def measure_reach(results: TaskResults, row: Row) -> Reach:
    """Return how many more steps, and how much more time, a method needed to the target, and what was predicted."""
    ratios: dict[int, float] = {}
    times: dict[int, float] = {}
    limits: list[float] = []
    exact_steps = results.exact.declaration.get("steps", 0)
    steps, planning = steps_share(results, row), planning_share(results, row)
    seeds = tuple(sorted(set(row.runs) & set(results.exact.runs)))
    for seed in seeds:
        curve = results.exact.runs[seed]["result"]["curve"]
        target = _interpolate(curve, TARGET_SHARE * curve[-1]["step"])
        exact = steps_to(curve, target)
        ours = steps_to(row.runs[seed]["result"]["curve"], target)
        if exact is None:
            continue
        limits.append(row.declaration["steps"] / exact)
        if ours is not None:
            ratios[seed] = ours / exact
            if steps is not None:
                # A plan is made once, however soon the target is reached.
                whole = steps * ours / row.declaration["steps"] + planning
                times[seed] = whole * exact_steps / exact
    omegas = row.omegas
    omega = summarise(omegas)[0] * (1 - row.exact_share) if omegas else None
    return Reach(
        ratios=ratios,
        times=times,
        seeds=seeds,
        limit=min(limits, default=math.inf),
        predicted=None if omega is None else _predict(results.exact, omega),
        noise_dominated=None if omega is None else 1 + omega,
    )


def _interpolate(curve: Sequence[dict[str, Any]], step: float) -> float:
    for first, second in itertools.pairwise(curve):
        if step <= second["step"]:
            share = max(0.0, (step - first["step"]) / (second["step"] - first["step"]))
            return (1 - share) * first["validation_loss"] + share * second["validation_loss"]
    return curve[-1]["validation_loss"]


def steps_to(curve: Sequence[dict[str, Any]], target: float) -> float | None:
    """Return the step at which the loss on validation data first comes down to the target, or None.

    Between points of the curve the loss is taken as straight; before the first point nothing is known, and its step is
    returned where it is below the target already.

    >>> points = [{"step": 10, "validation_loss": 2.0}, {"step": 20, "validation_loss": 1.0}]
    >>> steps_to(points, 1.5), steps_to(points, 0.5)
    (15.0, None)
    """
    known = [point for point in curve if point["validation_loss"] is not None]
    if known and known[0]["validation_loss"] <= target:
        return float(known[0]["step"])
    for first, second in itertools.pairwise(known):
        if second["validation_loss"] <= target:
            drop = first["validation_loss"] - second["validation_loss"]
            share = (first["validation_loss"] - target) / drop
            return first["step"] + share * (second["step"] - first["step"])
    return None


def _predict(exact: Row, omega: float) -> float | None:
    """Return the ratio of the bound; variance and squared norm of the gradient are means over exact training."""
    points = [point for record in exact.runs.values() for point in record["result"]["noise"]]
    signals = [point["squared_gradient"] for point in points if (point["squared_gradient"] or 0) > 0]
    variances = [point["mini_batch_variance"] for point in points if point["mini_batch_variance"]]
    if not signals or not variances:
        return None
    ratio = summarise(variances)[0] / summarise(signals)[0]
    return tradeoff(1.0, omega, noise_to_target=ratio).steps_ratio


def find_rival(results: TaskResults, row: Row, by: str = "time, batch") -> Row | None:
    """Return the exact method that was made equal to this one in a certain way, if it was run."""
    return next((rival for rival in find_rivals(results, row) if rival.match_by == by), None)
