"""From what was asked for to the experiment; apart from the command, so that other processes can build it too."""

from __future__ import annotations

import fnmatch
import functools
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.experiments.datasets import load, load_digit_pixels
from benchmarks.experiments.methods import list_methods
from benchmarks.experiments.tasks import Task, make_full_tasks, make_quick_tasks
from benchmarks.experiments.trials import Trials

# Timed steps of every method: equal times are read off these, and a busy machine scatters them.
_FULL_ROUNDS, _QUICK_ROUNDS = 31, 15


@dataclass(frozen=True)
class Settings:
    """What was asked for.

    Attributes:
        data: paths of data; none for the quick mode on the bundled digits.
        seeds: trainings of every method.
        epochs: factor on the passes over the data, for less than everything.
        threads: of torch, for every run.
        tasks: pattern of the names of the tasks that are wanted.
        methods: patterns of the labels that are wanted.
        own_rates: whether there is a second pass with a learning rate for each method.
        measurements: how many times the costs of a step are measured.
    """

    data: tuple[Path, ...] = ()
    seeds: int = 5
    epochs: float = 1.0
    threads: int = 1
    tasks: str = "*"
    methods: tuple[str, ...] = ("*",)
    own_rates: bool = True
    measurements: int = 1


def make_trials(settings: Settings) -> Trials:
    """Return the experiment that was asked for: the quick one without data, the full one with them."""
    tasks = make_tasks(settings.data)
    methods = tuple(method for method in list_methods() if settings.data or method.is_quick)
    chosen = tuple(_scale(task, settings.epochs) for task in tasks if fnmatch.fnmatchcase(task.name, settings.tasks))
    return Trials(
        tasks=chosen,
        methods=methods,
        seeds=tuple(range(settings.seeds)),
        rounds=_FULL_ROUNDS if settings.data else _QUICK_ROUNDS,
        threads=settings.threads,
        tuned="none" if not settings.own_rates else "all" if settings.data else "some",
        wanted=settings.methods,
        measurements=settings.measurements,
    )


@functools.cache
def make_tasks(data: tuple[Path, ...]) -> tuple[Task, ...]:
    """Return the tasks of these data, which are read once in a process: pictures are slow to decode."""
    if not data:
        return make_quick_tasks(load(None), load_digit_pixels())
    return tuple(task for path in data for task in make_full_tasks(load(path)))


def _scale(task: Task, factor: float) -> Task:
    return replace(task, steps=max(1, round(task.steps * factor)) if task.steps else 0)
