"""What was found on one task, read from its records: the only source of the figures in the documentation."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.experiments.declaration import NoiseRun, identify
from benchmarks.experiments.methods import EXACT, RULER_BY, SMALLER_BY, Method
from benchmarks.experiments.runner import Finds
from benchmarks.experiments.store import Lines, Record
from benchmarks.experiments.tasks import Task
from benchmarks.experiments.trials import Trials, is_declared, list_trainings
from cheapgrad.files import write_whole

_KIND = "cheapgrad.experiment.task"
_UNTIMED = ("held_bytes", "peak_bytes", "error")
# Networks, by a piece of the names of their tasks.
KINDS = ("MLP", "ViT", "BagNet", "language model")


class ResultsError(Exception):
    """A file of results is damaged."""


@dataclass(frozen=True)
class Row:
    """A method on a task.

    Attributes:
        label: what tables call it.
        family: methods that differ by a budget.
        budget: what is kept, as a share; None where that has no meaning.
        published: the published method that it corresponds to.
        is_biased: whether its gradient is wrong on average.
        is_tuned: whether the learning rate was chosen for it; otherwise it is the exact method's.
        match_label: the method that it is made equal to, or an empty text.
        match_by: in what.
        is_adaptive: whether what a step costs depends on the state of the training.
        exact_share: share of the steps that are exact although the others are not.
        words: what a step of the method does, or of the method that this one is made equal to.
        unavailable: why it was not run, or an empty text.
        costs: of a step on the usual batch, divided by those of the exact step; None where not measured, and without
            times for an adaptive method.
        ladder: pairs of batch size and time of an exact step, divided by that on the usual batch, as measured beside
            the method that this one is made equal to; empty for methods of their own.
        runs: record of each seed.
        is_declared: whether it belongs to the task; other rows are there because somebody asked for them.
    """

    label: str
    family: str
    budget: float | None
    published: str
    is_biased: bool
    is_tuned: bool
    match_label: str
    match_by: str
    is_adaptive: bool
    exact_share: float
    words: str
    unavailable: str
    costs: dict[str, Any] | None
    ladder: tuple[tuple[int, float], ...]
    runs: dict[int, Record]
    is_declared: bool = True

    def collect(self, name: str) -> dict[int, float]:
        """Return a figure of the result for each seed that has it."""
        values = {seed: record["result"].get(name) for seed, record in self.runs.items()}
        return {seed: float(value) for seed, value in values.items() if value is not None}

    @property
    def run_ids(self) -> tuple[str, ...]:
        """Which runs they are: rows may share them, as two smaller batches of equal size do."""
        return tuple(record["id"] for record in self.runs.values())

    @property
    def omegas(self) -> list[float]:
        """Added variance at every point where it was measured, all seeds together."""
        points = [point for record in self.runs.values() for point in record["result"]["noise"]]
        return [point["omega"] for point in points if point["omega"] is not None]

    @property
    def is_ruler(self) -> bool:
        """Whether it is exact training of fewer steps or on smaller batches, made to measure others with."""
        return self.match_by.startswith((RULER_BY, SMALLER_BY))

    @property
    def worst_omega(self) -> float | None:
        """Largest mean over the seeds of the added variance at a point of the training; None where not measured."""
        points: dict[int, list[float]] = {}
        for record in self.runs.values():
            for point in record["result"]["noise"]:
                if point["omega"] is not None:
                    points.setdefault(point["step"], []).append(point["omega"])
        return max((sum(values) / len(values) for values in points.values()), default=None)

    @property
    def declaration(self) -> dict[str, Any]:
        """What the runs have in common; empty without runs."""
        return next(iter(self.runs.values()))["declaration"] if self.runs else {}


@dataclass(frozen=True)
class TaskResults:
    """All that was found on a task.

    Attributes:
        task: its name.
        network: the network in words.
        data: name, sizes and checksum of the data.
        is_text: whether the loss is the figure that counts, and not the share of right classes.
        command: what makes the runs that are missing.
        left_out: recorded trainings that are in no row, in words.
        rows: the exact method first.
        weighed: noise of some methods, by what they do, at points of one exact training.
        environments: hardware, versions and commit, each combination once.
    """

    task: str
    network: str
    data: str
    is_text: bool
    command: str
    left_out: tuple[str, ...]
    rows: tuple[Row, ...]
    environments: tuple[dict[str, Any], ...]
    weighed: tuple[dict[str, Any], ...] = ()

    @property
    def slug(self) -> str:
        """The task's name for files and anchors."""
        return make_slug(self.task)

    @property
    def kind(self) -> str:
        """What kind of network it is."""
        return next((kind for kind in KINDS if kind in self.task), "")

    @property
    def is_quick(self) -> bool:
        """Whether it is one of the small networks on the bundled digits."""
        return self.data.startswith("digit")

    @property
    def exact(self) -> Row:
        """The row of the exact method."""
        return next(row for row in self.rows if row.label == EXACT.label)

    def find_row(self, label: str, *, is_tuned: bool = False) -> Row | None:
        """Return the row of a method, or None."""
        return next((row for row in self.rows if row.label == label and row.is_tuned == is_tuned), None)


def make_slug(name: str) -> str:
    """Return a name for files.

    >>> make_slug("ViT on cifar10")
    'vit_on_cifar10'
    """
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def write_results(trials: Trials, records: Finds, command: str, directory: Path) -> list[Path]:
    """Write one file of JSON lines for each task: what was asked for, and the records that answer it.

    The records are enough to go on from on another machine: those that chose learning rates are among them, and so is
    whatever the file had before of the same network on the same data.

    Args:
        trials: the experiment.
        records: what was run.
        command: what makes the runs that are missing.
        directory: where the files go.
    """
    paths = []
    for task in trials.tasks:
        path = directory / f"{make_slug(task.name)}.jsonl"
        rows, used = _list_rows(trials, task, records)
        noise = [records.find(identify(run)) for run in trials.list_noise_runs(task, records)]
        weighed = {record["id"]: record for record in noise if record is not None}
        used |= weighed
        before = {record["id"]: record for record in Lines(path)}
        everything = {**before, **{record["id"]: record for record in records}}
        head = {
            "kind": _KIND,
            "version": 3,
            "task": task.name,
            "network": task.network,
            "data": task.data,
            "is_text": task.dataset.is_text,
            "command": command,
            "left_out": _list_left_out(trials, task, everything.values(), used),
            "weighed": list(weighed),
            "rows": rows,
        }
        same = {name: head[name] for name in ("task", "network", "data")}
        # Noise that was weighed in another way is in no table.
        kept = {
            key: each
            for key, each in before.items()
            if same.items() <= each["declaration"].items() and each["declaration"]["kind"] != NoiseRun.kind
        } | used
        if not kept:
            continue
        adaptive = {method.step_words for method in trials.methods if method.is_adaptive}
        written = [_drop_times(_round(kept[identity]), adaptive) for identity in sorted(kept)]
        lines = [json.dumps(head), *map(json.dumps, written)]
        paths.append(path)
        write_whole(path, ("\n".join(lines) + "\n").encode())
    return paths


def _list_left_out(trials: Trials, task: Task, records: Iterable[Record], used: Container[str]) -> list[str]:
    """Return in words the trainings that are in no row: neither their size nor, maybe, their method is wanted now."""
    known = {method.words: method.label for method in reversed(trials.methods)}
    left: dict[str, list[int]] = {}
    # Such as a recipe that has changed since, or a method that only the full mode has.
    others = 0
    for run in list_trainings(task, records):
        if identify(run) in used:
            continue
        if run["method"] not in known:
            others += 1
            continue
        size = f"{run['steps']} steps on batches of {run['batch_size']}, rate {run['learning_rate']:g}"
        left.setdefault(f"{known[run['method']]}, {size}", []).append(run["seed"])
    words = [f"{words}, seeds {', '.join(map(str, sorted(seeds)))}" for words, seeds in sorted(left.items())]
    return [*words, *([f"trainings by methods that are not compared any more: {others}"] if others else [])]


def _round(value: Any) -> Any:
    """Return data with nine significant digits of every figure: more is noise, and files are to stay small."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        # What is declared is what the identity is the hash of.
        return {name: each if name == "declaration" else _round(each) for name, each in value.items()}
    return [_round(each) for each in value] if isinstance(value, list) else value


def _drop_times(record: Record, adaptive: Container[str]) -> Record:
    """Return a record without the times of steps that depend on the state of a training: measured apart, they mislead.

    Earlier versions measured them.
    """
    if record["declaration"]["kind"] != "costs":
        return record
    methods = {
        words: {name: value for name, value in costs.items() if words not in adaptive or name in _UNTIMED}
        for words, costs in record["result"]["methods"].items()
    }
    return {**record, "result": {**record["result"], "methods": methods}}


def _list_rows(trials: Trials, task: Task, records: Finds) -> tuple[list[dict[str, Any]], dict[str, Record]]:
    used = {record["id"]: record for record in trials.list_preparation(task, records)}
    runs: dict[tuple[str, bool], dict[int, str]] = {}
    for trial in trials.list_trials(records):
        record = records.find(identify(trial.run)) if trial.task is task else None
        if record is not None:
            used[record["id"]] = record
            runs.setdefault((trial.method.label, trial.is_tuned), {})[trial.run.seed] = record["id"]
    rows = []
    for method in trials.methods:
        passes = [is_tuned for is_tuned in (False, True) if (method.label, is_tuned) in runs] or [False]
        for is_tuned in passes:
            rows.append(_describe_row(trials, task, method, records, is_tuned, runs.get((method.label, is_tuned), {})))
    return rows, used


def _describe_row(
    trials: Trials, task: Task, method: Method, records: Finds, is_tuned: bool, runs: dict[int, str]
) -> dict[str, Any]:
    costs = trials.find_costs(task, method, records)
    measured = trials.find_measurements(task, trials.find_other(method), records)
    return {
        "label": method.label,
        "family": method.family,
        "budget": method.budget,
        "published": method.published,
        "is_biased": method.is_biased,
        "is_tuned": is_tuned,
        "match_label": method.match.label if method.match else "",
        "match_by": method.match.by if method.match else "",
        "is_adaptive": method.is_adaptive,
        "exact_share": method.exact_share,
        "unavailable": (costs or {}).get("error", ""),
        "is_declared": is_declared(task, method),
        "words": trials.find_other(method).step_words,
        "costs": measured[-1]["id"] if measured else None,
        "runs": runs,
    }


def read_results(directory: Path) -> list[TaskResults]:
    """Return what all files of a directory say, sorted by name of the file.

    Raises:
        ResultsError: if one of them is damaged; the message names it.
    """
    return [_read_whole(path) for path in sorted(directory.glob("*.jsonl"))]


def _read_whole(path: Path) -> TaskResults:
    try:
        return _read_task(path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(
            f"{path} is damaged ({type(error).__name__}: {error}); restore it from the repository, or delete it and "
            "write it again with --docs from the directory of the runs"
        ) from error


def _read_task(path: Path) -> TaskResults:
    with path.open(encoding="utf-8") as stream:
        head = json.loads(stream.readline())
    records = Lines(path)
    rows = tuple(_read_row(row, records) for row in head["rows"])
    environments: dict[str, dict[str, Any]] = {}
    for record in sorted((record for row in rows for record in row.runs.values()), key=lambda each: each["id"]):
        environment = {name: record["environment"][name] for name in ("processor", "torch", "commit")}
        environments.setdefault(json.dumps(environment), environment)
    return TaskResults(
        head["task"],
        head["network"],
        head["data"],
        head["is_text"],
        head["command"],
        tuple(head["left_out"]),
        rows,
        tuple(environments[key] for key in sorted(environments)),
        _read_weighed(head.get("weighed") or [], records),
    )


def _read_weighed(identities: str | list[str], records: Lines) -> tuple[dict[str, Any], ...]:
    """Return the points of the training at which noise was weighed, the methods of all runs at each of them."""
    # Files from before there were several runs name one.
    runs = [identities] if isinstance(identities, str) else identities
    points: dict[int, dict[str, Any]] = {}
    for identity in runs:
        for point in _find_whole(records, identity)["result"]["points"]:
            points.setdefault(point["step"], {}).update(point["methods"])
    return tuple({"step": step, "methods": methods} for step, methods in sorted(points.items()))


def _find_whole(records: Lines, identity: str) -> Record:
    record = records.find(identity)
    if record is None:
        raise ValueError(f"the record of run {identity} is missing")
    return record


def _read_row(row: dict[str, Any], records: Lines) -> Row:
    runs = {int(seed): _find_whole(records, identity) for seed, identity in sorted(row["runs"].items())}
    # Only the measurement that the row was written with: the file may have others, of another batch say.
    measured = _find_whole(records, row["costs"]) if row["costs"] is not None else None
    ladder = measured["result"]["ladder"] if measured is not None and row["match_label"] else []
    return Row(
        **{name: value for name, value in row.items() if name not in {"costs", "runs"}},
        costs=None if measured is None or row["match_label"] else _read_costs(measured, row),
        ladder=tuple((int(size), float(ratio)) for size, ratio in ladder),
        runs=runs,
    )


def _read_costs(measured: Record, row: dict[str, Any]) -> dict[str, Any] | None:
    """Return the costs of a row's step, bytes as a share of those of the exact step of the same measurement."""
    methods = measured["result"]["methods"]
    costs, exact = methods[row["words"]], methods[EXACT.step_words]
    if "error" in costs:
        return None
    return {**costs, "held_share": costs["held_bytes"] / exact["held_bytes"]}
