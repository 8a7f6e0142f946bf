"""``python -m benchmarks.experiments``: train every method, keep a record of each run, write the pages of the docs."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from benchmarks.experiments.datasets import DataError
from benchmarks.experiments.declaration import CostRun, TrainingRun, identify
from benchmarks.experiments.pages import write_pages
from benchmarks.experiments.results import ResultsError, read_results, write_results
from benchmarks.experiments.runner import find_missing, name_run, run_all
from benchmarks.experiments.settings import Settings, make_trials
from benchmarks.experiments.store import Store
from benchmarks.experiments.trials import TUNING_SEEDS, Trials

_ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
# As a pattern that asks: budgets too that are trained on no task of their own accord.
_WHATEVER = "?*"


def main() -> int:
    """Do what was asked for and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments", description=__doc__)
    parser.add_argument(
        "--data",
        type=Path,
        action="append",
        default=[],
        help="an .npz, an image folder or a zip of one, or a text; several times for several (default: the quick mode)",
    )
    parser.add_argument("--seeds", type=int, default=5, help="trainings of every method (default: 5)")
    parser.add_argument("--epochs", type=float, default=1.0, help="factor on the passes over the data (default: 1)")
    parser.add_argument("--tasks", default="*", help="only tasks whose name matches this pattern")
    parser.add_argument(
        "--methods",
        action="append",
        help="only methods whose label matches this pattern; repeatable; further budgets of published methods are "
        "trained on the small perceptron alone unless a pattern other than * asks for them",
    )
    parser.add_argument("--shared-rate", action="store_true", help="leave out the pass with a rate for each method")
    parser.add_argument(
        "--measurements",
        type=int,
        default=1,
        help="how many times costs of a step are measured (default: 1); one more than there are measures them here and "
        "now, and repeats only trainings whose size was matched to costs that turn out otherwise",
    )
    parser.add_argument("--fresh", action="store_true", help="take no notice of the runs that come with the repository")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("experiments"), help="where the runs' records are kept")
    parser.add_argument("--list", action="store_true", help="say what is done and what is missing, and run nothing")
    parser.add_argument(
        "--docs",
        action="store_true",
        help="write results and the pages of the documentation from the records; run nothing",
    )
    arguments = parser.parse_args()
    for name in ("seeds", "workers", "threads", "measurements"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, but is {getattr(arguments, name)}")
    if arguments.list and arguments.docs:
        parser.error("--list runs and writes nothing, and --docs writes; give one of them")
    if not arguments.epochs > 0:
        parser.error(f"--epochs must be above 0, but is {arguments.epochs:g}")
    settings = Settings(
        tuple(arguments.data),
        arguments.seeds,
        arguments.epochs,
        arguments.threads,
        arguments.tasks,
        tuple(arguments.methods or ["*"]),
        not arguments.shared_rate,
        arguments.measurements,
    )
    console = Console()
    try:
        trials = make_trials(settings)
    except DataError as error:
        parser.error(str(error))
    if not trials.tasks:
        parser.error(f"--tasks {arguments.tasks!r} matches none of the tasks of these data")
    for pattern in settings.methods:
        if not trials.has_match(pattern):
            parser.error(f"--methods {pattern!r} matches no method; --list names them all")
    committed = () if arguments.fresh else tuple(sorted(RESULTS.glob("*.jsonl")))
    try:
        if arguments.docs:
            _write_docs(settings, Store(arguments.out, committed), console)
            return 0
        if arguments.list:
            _list(trials, Store(arguments.out, committed), console)
            return 0
    except ResultsError as error:
        console.print(str(error), highlight=False)
        return 1
    errors = run_all(partial(make_trials, settings), arguments.out, arguments.workers, console, committed)
    for error in errors:
        console.print(error, highlight=False)
    lines = Store(arguments.out).export(arguments.out / "records.jsonl")
    console.print(f"{lines} records in {arguments.out / 'records.jsonl'}", highlight=False)
    return 1 if errors else 0


def _list(trials: Trials, store: Store, console: Console) -> None:
    missing, declared = find_missing(trials, store)
    console.print(f"{declared - len(missing)} of {declared} runs that are known to be wanted have a record")
    table = Table(Column("seeds that are done", no_wrap=True), *(task.name for task in trials.tasks))
    made = Counter(
        (trial.method.label, trial.task.name)
        for trial in trials.list_trials(store)
        if not trial.is_tuned and store.find(identify(trial.run)) is not None
    )
    for method in trials.methods:
        counts = [
            str(made[method.label, task.name]) if method in trials.list_wanted(task) else "not asked for"
            for task in trials.tasks
        ]
        table.add_row(method.label, *counts)
    console.print(table)
    others = [name_run(run) for run in missing if not isinstance(run, TrainingRun) or run.seed in TUNING_SEEDS]
    if others:
        console.print("Missing before or beside these:", highlight=False)
    for name in others:
        console.print(f"  {name}", highlight=False)
    if any(isinstance(run, CostRun) for run in missing):
        console.print("What is trained is known once all costs are measured.", highlight=False)


def _describe_command(settings: Settings) -> str:
    """Return what makes all runs of these tasks, without the places where things lie on this machine."""
    words = ["python -m benchmarks.experiments", *(f"--data {path.name}" for path in settings.data)]
    if settings.epochs != 1:
        words.append(f"--epochs {settings.epochs:g}")
    return " ".join(words)


def _write_docs(settings: Settings, store: Store, console: Console) -> None:
    # Whatever there is belongs on the page, not only what this command would run.
    everything = replace(settings, seeds=min(TUNING_SEEDS), methods=(_WHATEVER,), own_rates=True)
    RESULTS.mkdir(exist_ok=True)
    # A damaged file is said before anything is written.
    read_results(RESULTS)
    for path in write_results(make_trials(everything), store, _describe_command(settings), RESULTS):
        console.print(path.name, highlight=False)
    for name in write_pages(RESULTS, _ROOT / "docs"):
        console.print(name, highlight=False)
    for results in read_results(RESULTS):
        for words in results.left_out:
            console.print(f"recorded and in no row: {results.task}: {words}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
