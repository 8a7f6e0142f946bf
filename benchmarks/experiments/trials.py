"""All runs that are wanted: costs first, then learning rates, then every method on every seed."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.experiments.costs import measure_costs
from benchmarks.experiments.declaration import CostRun, Declaration, NoiseRun, TrainingRun, identify
from benchmarks.experiments.matching import Size, match
from benchmarks.experiments.methods import EXACT, KEEPS, Method
from benchmarks.experiments.runner import Finds
from benchmarks.experiments.store import Record
from benchmarks.experiments.tasks import Task
from benchmarks.experiments.training import train
from benchmarks.experiments.weighed_noise import measure_weighed_noise

# Runs that choose learning rates have seeds of their own: what is chosen on them says nothing about the others.
TUNING_SEEDS = (100,)
# Trainings made equal in time stay valid while a later measurement, or another reading of it, would change them by no
# more than this share of the usual number of examples.
_SAME_SIZE = 0.05
# What a pattern has to match for the noise of these methods to be weighed, all at the weights of one exact training.
WEIGHED = "noise in units of the optimizer's steps"
# A run for each group, so that a new group leaves the others' records valid.
_WEIGHED_GROUPS = (
    (
        *(
            f"{family}{keep}{end}"
            for family, end in (("recipes.speed(", ")"), ("uniform masks, rows ", ""))
            for keep in KEEPS
        ),
        *(f"recipes.memory({bits})" for bits in (4, 2)),
    ),
    tuple(f"{family} {keep}" for family in ("cotangent examples", "stored rows", "stored features") for keep in KEEPS),
)
_NOISE_POINTS, _NOISE_BATCHES, _NOISE_DRAWS = (0.1, 0.3, 0.5, 0.7, 0.9), 32, 1


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
        measurements: how many times costs are measured; the last time is the one that counts.
    """

    tasks: tuple[Task, ...]
    methods: tuple[Method, ...]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    rounds: int = 11
    threads: int = 1
    tuned: str = "some"
    wanted: tuple[str, ...] = ("*",)
    measurements: int = 1

    # -- what is wanted -------------------------------------------------------------------------------------------

    def declare(self, records: Finds) -> list[Declaration]:
        """Return all runs that are known to be wanted: what depends on records that are not there yet comes later."""
        costs: list[Declaration] = [
            run
            for measurement in range(self.measurements)
            for task in self.tasks
            for run in self.list_cost_runs(task, measurement)
            if not self._is_measured_otherwise(task, run, records)
        ]
        if any(records.find(identify(run)) is None for run in costs):
            return costs
        tuning = [run for task in self._trained_tasks() for run in self._declare_tuning(task, records)]
        noise = [run for task in self._trained_tasks() for run in self.list_noise_runs(task, records)]
        return [*costs, *tuning, *noise, *[trial.run for trial in self.list_trials(records)]]

    def list_cost_runs(self, task: Task, measurement: int = 0) -> list[CostRun]:
        """Return one run for each family of methods, so that a new family leaves the others' records valid."""
        families: dict[str, dict[str, None]] = {}
        wanted = self.list_wanted(task)
        others = {method.match.label for method in wanted if method.match is not None}
        chosen = {method.family for method in self.methods if method in wanted or method.label in others}
        for method in self.methods:
            # Matched methods are exact steps of other sizes, or a method that is measured anyway.
            if method.match is None and method.family in chosen:
                families.setdefault(method.family, {})[method.step_words] = None
        return [
            CostRun(
                task.name,
                task.network,
                task.data,
                task.batch_size,
                tuple(words),
                self.rounds,
                self.threads,
                measurement,
            )
            for words in families.values()
        ]

    def list_trials(self, records: Finds) -> Iterator[Trial]:
        """Yield the trainings whose learning rate is known."""
        for task in self._trained_tasks():
            shared = self.choose_rate(task, EXACT, records)
            if shared is None:
                continue
            for method in self.list_wanted(task):
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

    def list_noise_runs(self, task: Task, records: Finds) -> list[NoiseRun]:
        """Return the runs that weigh noise; none where they are not wanted, or the rate of exact training unknown."""
        rate = self.choose_rate(task, EXACT, records)
        if rate is None or not self._is_wanted(WEIGHED, self.wanted):
            return []
        return [
            NoiseRun(
                task=task.name,
                network=task.network,
                data=task.data,
                batch_size=task.batch_size,
                methods=tuple(each.step_words for each in self.methods if each is EXACT or each.label in labels),
                steps=task.steps,
                learning_rate=rate,
                seed=0,
                points=_NOISE_POINTS,
                # Of one pass over the data, and no more than half of it: the batches are to be nearly independent.
                batches=max(2, min(_NOISE_BATCHES, len(task.dataset.train) // task.batch_size // 2)),
                draws=_NOISE_DRAWS,
            )
            for labels in _WEIGHED_GROUPS
            if any(each.label in labels for each in self.methods)
        ]

    def list_wanted(self, task: Task) -> list[Method]:
        """Return the methods that are trained on a task: the exact one, and those that match a pattern.

        Further budgets that belong to no task of their own accord are left out, unless a pattern asks for them.
        """
        return [
            method
            for method in self.methods
            if method is EXACT
            or self._is_wanted(method.label, self.wanted if is_declared(task, method) else set(self.wanted) - {"*"})
        ]

    def has_match(self, pattern: str) -> bool:
        """Tell whether a pattern matches the label of a method, or of the run that weighs noise."""
        return any(fnmatch.fnmatchcase(label, pattern) for label in (WEIGHED, *(each.label for each in self.methods)))

    def _is_wanted(self, label: str, patterns: Iterable[str]) -> bool:
        return any(fnmatch.fnmatchcase(label, pattern) for pattern in patterns)

    def find_costs(self, task: Task, method: Method, records: Finds) -> dict[str, Any] | None:
        """Return what was measured last of a step of a method on the usual batch, or None where that is not known."""
        found = self.find_measurements(task, method, records)
        return found[-1]["result"]["methods"].get(method.step_words) if found else None

    def find_measurements(self, task: Task, method: Method, records: Finds) -> list[Record]:
        """Return the records of what a step of a method costs on the usual batch, the one that counts last.

        How many steps were timed, and which other methods in turn with it, does not decide whether a record is found:
        trainings whose size was matched to it would be lost with it.
        """
        found = [record for record in self._list_costs(task, records) if method.step_words in _words_of(record)]
        return sorted(found, key=lambda record: (*_order_of(record), record["id"]))

    def _list_costs(self, task: Task, records: Finds) -> Iterator[Record]:
        wanted = {
            "kind": CostRun.kind,
            "task": task.name,
            "network": task.network,
            "data": task.data,
            "batch_size": task.batch_size,
            "threads": self.threads,
        }
        return (record for record in records if wanted.items() <= record["declaration"].items())

    def _is_measured_otherwise(self, task: Task, run: CostRun, records: Finds) -> bool:
        """Return whether other records hold all of a measurement: with another number of steps, say."""
        if records.find(identify(run)) is not None:
            return False
        same = [record for record in self._list_costs(task, records) if record["declaration"]["seed"] == run.seed]
        return set(run.methods) <= {words for record in same for words in _words_of(record)}

    def find_size(self, task: Task, method: Method, records: Finds) -> Size | None:
        """Return batch size, steps and micro-batches of a method; None where it does not fit the network."""
        usual = Size(task.batch_size, task.steps)
        costs, exact = self.find_costs(task, method, records), self.find_costs(task, EXACT, records)
        if costs is None or exact is None or "error" in costs:
            return None
        if method.match is None:
            return usual
        other = self.find_other(method)
        chosen: Size | None = None
        for record in self.find_measurements(task, other, records):
            size = _match_in(record, method.match.by, usual, other)
            if size is not None and (chosen is None or _differ(size, chosen, usual)):
                chosen = size
        is_timed = chosen is not None and method.match.by.startswith("time")
        return self._find_made(task, chosen, records) if chosen is not None and is_timed else chosen

    def _find_made(self, task: Task, size: Size, records: Finds) -> Size:
        """Return the size itself, or one that hardly differs if exact trainings of that size are made already."""
        usual = Size(task.batch_size, task.steps)
        made = Counter(
            Size(run["batch_size"], run["steps"], run["parts"])
            for run in list_trainings(task, records)
            if run["method"] == EXACT.words and run["evaluations"] == task.evaluations
        )
        if size == usual or made[size]:
            return size
        fewer_steps = size.batch_size == usual.batch_size
        near = [
            each
            for each in made
            if each != usual and (each.batch_size == usual.batch_size) == fewer_steps and not _differ(each, size, usual)
        ]
        return max(near, key=lambda each: (made[each], each.batch_size, each.steps), default=size)

    def find_other(self, method: Method) -> Method:
        """Return the method that this one is made equal to; itself if there is none."""
        label = method.match.label if method.match is not None else method.label
        return next(each for each in self.methods if each.label == label)

    def choose_rate(self, task: Task, method: Method, records: Finds) -> float | None:
        """Return the learning rate that is best on the validation data (mean over tuning seeds), or None.

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

    def list_preparation(self, task: Task, records: Finds) -> list[Record]:
        """Return the records of what comes before the trainings: all measurements of costs, and the choice of rates."""
        runs = [run for method in self.list_wanted(task) for run in self._declare_rates(task, method, records)]
        found = [record for run in runs if (record := records.find(identify(run))) is not None]
        own = [method for method in self.methods if method.match is None]
        return [*found, *(record for method in own for record in self.find_measurements(task, method, records))]

    def _trained_tasks(self) -> list[Task]:
        return [task for task in self.tasks if task.steps]

    def _has_own_rate(self, method: Method) -> bool:
        return (
            method is not EXACT
            and not method.is_ruler
            and (self.tuned == "all" or (self.tuned == "some" and method.is_tuned))
        )

    def _declare_tuning(self, task: Task, records: Finds) -> Iterator[TrainingRun]:
        yield from self._declare_rates(task, EXACT, records)
        for method in self.list_wanted(task):
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
            # Weights and batch are the same in every measurement: only the machine's state differs.
            return measure_costs(task, self._find_methods(declaration.methods), declaration.rounds, 0)
        if isinstance(declaration, NoiseRun):
            return measure_weighed_noise(task, self._find_methods(declaration.methods), declaration)
        return train(task, self._find_methods([declaration.method])[0], declaration)

    def _find_methods(self, words: Sequence[str]) -> list[Method]:
        by_words = {name: method for method in reversed(self.methods) for name in (method.step_words, method.words)}
        return [by_words[each] for each in words]


def is_declared(task: Task, method: Method) -> bool:
    """Tell whether a method belongs to a task without being asked for by a pattern of its own."""
    return task.sweeps or not method.is_swept


def list_trainings(task: Task, records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """Yield what is declared of the trainings of a task, those left out that chose learning rates."""
    for record in records:
        run = record["declaration"]
        is_same = (run["task"], run["network"], run["data"]) == (task.name, task.network, task.data)
        if is_same and run["kind"] == TrainingRun.kind and run["seed"] < min(TUNING_SEEDS):
            yield run


def _words_of(record: Record) -> list[str]:
    return record["declaration"]["methods"]


def _order_of(record: Record) -> tuple[int, int]:
    """Return what the later one of two records of costs has more of: a measurement made again, or more steps."""
    return record["declaration"]["seed"], record["declaration"]["rounds"]


def _match_in(record: Record, by: str, usual: Size, other: Method) -> Size | None:
    """Return the size that one measurement says."""
    measured = record["result"]["methods"]
    found, exact = measured.get(other.step_words), measured[EXACT.step_words]
    if found is None or "error" in found:
        return None
    return match(
        by,
        usual,
        ratio=other.exact_share + (1 - other.exact_share) * found["ratio"],
        # Climbed in turn with the method itself: both were slowed down by the same neighbours.
        ladder=record["result"]["ladder"],
        bytes_share=found["held_bytes"] / exact["held_bytes"],
    )


def _differ(size: Size, chosen: Size, usual: Size) -> bool:
    examples = size.batch_size * size.steps - chosen.batch_size * chosen.steps
    return abs(examples) > _SAME_SIZE * usual.batch_size * usual.steps or size.parts != chosen.parts
