"""All runs that are wanted: costs first, then learning rates, then every method on every seed."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.experiments.costs import measure_costs
from benchmarks.experiments.declaration import CostRun, Declaration, TrainingRun, identify
from benchmarks.experiments.matching import Size, match
from benchmarks.experiments.methods import EXACT, Method
from benchmarks.experiments.runner import Finds
from benchmarks.experiments.store import Record
from benchmarks.experiments.tasks import Task
from benchmarks.experiments.training import train

# Runs that choose learning rates have seeds of their own: what is chosen on them says nothing about the others.
TUNING_SEEDS = (100, 101)


@dataclass(frozen=True)
class Trial:
    """One training of one method.

    Attributes:
        task: the task.
        method: the method.
        is_tuned: whether the learning rate was chosen for this method; otherwise it is the one of the exact method.
        run: what is declared.
    """

    task: Task
    method: Method
    is_tuned: bool
    run: TrainingRun


@dataclass(frozen=True)
class Trials:
    """The experiment.

    Attributes:
        tasks: networks on data.
        methods: all methods; costs are measured for all of a family if one of them is wanted.
        seeds: of every method, on every task.
        rounds: timed steps of every method.
        threads: of torch, for every run.
        tuned: which methods get a learning rate of their own too: ``"all"``, ``"none"``, or ``"some"`` that say so.
        wanted: patterns of labels, one of which a method has to match to be trained.
    """

    tasks: tuple[Task, ...]
    methods: tuple[Method, ...]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    rounds: int = 11
    threads: int = 1
    tuned: str = "some"
    wanted: tuple[str, ...] = ("*",)

    # -- what is wanted -------------------------------------------------------------------------------------------

    def declare(self, records: Finds) -> list[Declaration]:
        """Return all runs that are known to be wanted: what depends on records that are not there yet comes later."""
        costs: list[Declaration] = [run for task in self.tasks for run in self.list_cost_runs(task)]
        if any(records.find(identify(run)) is None for run in costs):
            return costs
        tuning = [run for task in self._trained_tasks() for run in self._declare_tuning(task, records)]
        return [*costs, *tuning, *[trial.run for trial in self.list_trials(records)]]

    def list_cost_runs(self, task: Task) -> list[CostRun]:
        """Return one run for each family of methods, so that a new family leaves the others' records valid."""
        families: dict[str, list[str]] = {}
        wanted = self.list_wanted()
        others = {method.match.label for method in wanted if method.match is not None}
        chosen = {method.family for method in self.methods if method in wanted or method.label in others}
        for method in self.methods:
            # Matched methods are exact steps of other sizes, or a method that is measured anyway.
            if method.match is None and method.family in chosen and not method.why_unavailable():
                families.setdefault(method.family, []).append(method.words)
        return [
            CostRun(task.name, task.network, task.data, task.batch_size, tuple(words), self.rounds, self.threads)
            for words in families.values()
        ]

    def list_trials(self, records: Finds) -> Iterator[Trial]:
        """Yield the trainings whose learning rate is known."""
        for task in self._trained_tasks():
            shared = self.choose_rate(task, EXACT, records)
            if shared is None:
                continue
            for method in self.list_wanted():
                size = self.find_size(task, method, records)
                if size is None:
                    continue
                rates = {False: shared}
                own = self.choose_rate(task, method, records) if self._has_own_rate(method) else None
                if own is not None:
                    rates[True] = own
                for is_tuned, rate in rates.items():
                    for seed in self.seeds:
                        yield Trial(task, method, is_tuned, self._declare_training(task, method, size, rate, seed))

    def list_wanted(self) -> list[Method]:
        """Return the methods that are trained: the exact one, and those that match a pattern and can be run here."""
        return [
            method
            for method in self.methods
            if (method is EXACT or any(fnmatch.fnmatchcase(method.label, pattern) for pattern in self.wanted))
            and not method.why_unavailable()
        ]

    def find_costs(self, task: Task, method: Method, records: Finds) -> dict[str, Any] | None:
        """Return what was measured of a step of a method on the usual batch, or None where that is not known."""
        record = self._find_cost_record(task, method, records)
        return None if record is None else record["result"]["methods"].get(method.words)

    def _find_cost_record(self, task: Task, method: Method, records: Finds) -> Record | None:
        for run in self.list_cost_runs(task):
            record = records.find(identify(run)) if method.words in {*run.methods, EXACT.words} else None
            if record is not None:
                return record
        return None

    def find_size(self, task: Task, method: Method, records: Finds) -> Size | None:
        """Return batch size, steps and micro-batches of a method; None where it does not fit the network."""
        usual = Size(task.batch_size, task.steps)
        costs, exact = self.find_costs(task, method, records), self.find_costs(task, EXACT, records)
        if costs is None or exact is None or "error" in costs:
            return None
        if method.match is None:
            return usual
        other = next(each for each in self.methods if each.label == method.match.label)
        record = self._find_cost_record(task, other, records)
        found = None if record is None else record["result"]["methods"].get(other.words)
        if record is None or found is None or "error" in found:
            return None
        # The ladder was climbed in turn with the method itself: both were slowed down by the same neighbours.
        return match(
            method.match.by,
            usual,
            ratio=found["ratio"],
            ladder=record["result"]["ladder"],
            bytes_share=found["held_bytes"] / exact["held_bytes"],
        )

    def choose_rate(self, task: Task, method: Method, records: Finds) -> float | None:
        """Return the learning rate that is best on the validation data, mean over the tuning seeds; None until known.

        Best is the highest accuracy for classes and the lowest loss for text; ties go to the lower loss.
        """
        scores: dict[float, list[tuple[float, float]]] = {}
        for run in self._declare_rates(task, method, records):
            record = records.find(identify(run))
            if record is None:
                return None
            result = record["result"]
            loss = result["validation_loss"] if result["validation_loss"] is not None else float("inf")
            main = loss if task.dataset.is_text else -result["validation_accuracy"]
            scores.setdefault(run.learning_rate, []).append((main, loss))
        if not scores:
            return None
        return min(scores, key=lambda rate: tuple(sum(each) for each in zip(*scores[rate], strict=True)))

    def _trained_tasks(self) -> list[Task]:
        return [task for task in self.tasks if task.steps]

    def _has_own_rate(self, method: Method) -> bool:
        return method is not EXACT and (self.tuned == "all" or (self.tuned == "some" and method.is_tuned))

    def _declare_tuning(self, task: Task, records: Finds) -> Iterator[TrainingRun]:
        yield from self._declare_rates(task, EXACT, records)
        for method in self.list_wanted():
            if self._has_own_rate(method):
                yield from self._declare_rates(task, method, records)

    def _declare_rates(self, task: Task, method: Method, records: Finds) -> list[TrainingRun]:
        size = self.find_size(task, method, records)
        if size is None:
            return []
        return [
            self._declare_training(task, method, size, rate, seed)
            for rate in task.learning_rates
            for seed in TUNING_SEEDS
        ]

    def _declare_training(self, task: Task, method: Method, size: Size, rate: float, seed: int) -> TrainingRun:
        return TrainingRun(
            task=task.name,
            network=task.network,
            data=task.data,
            method=method.words,
            batch_size=size.batch_size,
            parts=size.parts,
            steps=size.steps,
            learning_rate=rate,
            seed=seed,
            evaluations=task.evaluations,
            # Runs that choose a learning rate need no more than their last figures.
            noise_points=0 if seed in TUNING_SEEDS else task.noise_points,
        )

    # -- making a run ---------------------------------------------------------------------------------------------

    def name_lock(self, declaration: Declaration) -> str:
        """Return one lock for all measurements of time, and one for each training."""
        return "costs" if declaration.kind == "costs" else identify(declaration)

    def execute(self, declaration: Declaration) -> dict[str, Any]:
        """Make one run."""
        torch.set_num_threads(self.threads)
        task = next(task for task in self.tasks if task.name == declaration.task)
        if isinstance(declaration, CostRun):
            return measure_costs(task, self._find_methods(declaration.methods), declaration.rounds, declaration.seed)
        return train(task, self._find_methods([declaration.method])[0], declaration)

    def _find_methods(self, words: Sequence[str]) -> list[Method]:
        by_words = {method.words: method for method in reversed(self.methods)}
        return [by_words[each] for each in words]
