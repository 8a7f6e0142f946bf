"""Makes the runs that are declared and not yet recorded, in one process or in several."""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.environment import describe_environment
from benchmarks.experiments.declaration import CostRun, Declaration, NoiseRun, describe, identify
from benchmarks.experiments.store import Record, Store
from cheapgrad.demo.workers import open_workers

# While others make what this process has to wait for.
_WAIT_SECONDS = 0.5


class Finds(Protocol):
    """What has records."""

    def find(self, identity: str) -> Record | None:
        """Return the record of a run, or None."""
        ...

    def __iter__(self) -> Iterator[Record]:
        """Yield all records, each run once."""
        ...


class Experiment(Protocol):
    """What is to be run."""

    def declare(self, records: Finds) -> Sequence[Declaration]:
        """Return all runs that are known to be wanted, those made already included; records may make more known."""
        ...

    def execute(self, declaration: Declaration) -> dict[str, Any]:
        """Make one run and return what was found, as data for JSON."""
        ...

    def name_lock(self, declaration: Declaration) -> str:
        """Return the lock that a run needs: its own, or one that it shares with runs that must not run beside it."""
        ...


def find_missing(experiment: Experiment, store: Finds) -> tuple[list[Declaration], int]:
    """Return the runs that have no record, and how many are declared."""
    declared = {identify(declaration): declaration for declaration in experiment.declare(store)}
    missing = [declaration for identity, declaration in declared.items() if store.find(identity) is None]
    return missing, len(declared)


def work(
    experiment: Experiment, store: Store, on_progress: Callable[[int, int, str], object] = lambda *_: None
) -> list[str]:
    """Make runs until none is missing, and return the errors of those that failed.

    Args:
        experiment: what to run.
        store: where records are; other processes may work on the same one.
        on_progress: called with the number of runs done, that of runs declared, and what comes next.
    """
    failed: dict[str, str] = {}
    while True:
        missing, declared = find_missing(experiment, store)
        todo = [declaration for declaration in missing if identify(declaration) not in failed]
        if not todo:
            return list(failed.values())
        for declaration in todo:
            on_progress(declared - len(missing), declared, name_run(declaration))
            if _make(experiment, store, declaration, failed):
                break
        else:
            time.sleep(_WAIT_SECONDS)


def _make(experiment: Experiment, store: Store, declaration: Declaration, failed: dict[str, str]) -> bool:
    """Make one run unless somebody else does; return whether anything was done."""
    identity = identify(declaration)
    with store.claim(experiment.name_lock(declaration)) as is_ours:
        if not is_ours:
            return False
        # Somebody may have made it since the list was.
        if store.find(identity) is not None:
            return True
        try:
            result = experiment.execute(declaration)
        except Exception:
            failed[identity] = f"{name_run(declaration)} ({identity}) failed:\n{traceback.format_exc()}"
            return True
        store.save(describe(declaration), result, describe_environment(declaration.seed))
    return True


def name_run(declaration: Declaration) -> str:
    """Return what a person would call a run."""
    if isinstance(declaration, CostRun):
        return f"{declaration.task}: costs"
    if isinstance(declaration, NoiseRun):
        return f"{declaration.task}: noise in units of the optimizer's steps"
    return f"{declaration.task}: {declaration.method}, rate {declaration.learning_rate:g}, seed {declaration.seed}"


def run_all(
    make_experiment: Callable[[], Experiment],
    directory: Path,
    workers: int,
    console: Console,
    committed: tuple[Path, ...] = (),
) -> list[str]:
    """Make all runs, with progress on the console, and return the errors of those that failed.

    Args:
        make_experiment: builds the same experiment in every process; can be pickled.
        directory: of the store.
        workers: processes that make runs, one thread each; with one, this process does.
        console: for the bar.
        committed: files of records that count as made.
    """
    store = Store(directory, committed)
    for name in store.list_damaged():
        console.print(f"{name} is no whole record; its run is made again", highlight=False)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=None)

        def show(done: int, declared: int, what: str) -> None:
            progress.update(bar, completed=done, total=declared, description=what)

        experiment = make_experiment()
        if workers == 1:
            return work(experiment, store, show)
        with _watch(experiment, store, show), open_workers(workers) as pool:
            tasks = [partial(_work_alone, make_experiment, directory, committed) for _ in range(workers)]
            # All workers meet the same failures.
            return sorted({error for errors in pool.run(tasks, lambda: None) for error in errors})


def _work_alone(make_experiment: Callable[[], Experiment], directory: Path, committed: tuple[Path, ...]) -> list[str]:
    return work(make_experiment(), Store(directory, committed))


@contextlib.contextmanager
def _watch(experiment: Experiment, store: Store, show: Callable[[int, int, str], object]) -> Iterator[None]:
    """Show how far all processes together are, until the context ends."""
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(_WAIT_SECONDS):
            missing, declared = find_missing(experiment, store)
            show(declared - len(missing), declared, name_run(missing[0]) if missing else "")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
