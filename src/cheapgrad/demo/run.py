"""The demo from beginning to end."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cheapgrad.demo.data import Digits, load_data
from cheapgrad.demo.methods import EXACT, Method, check_methods, make_default_methods
from cheapgrad.demo.model_run import AddBar, Amounts, ModelRun
from cheapgrad.demo.setups import SETUPS, WIDE, Setup, make_quick
from cheapgrad.demo.timing import WARM_UP_ROUNDS, time_steps
from cheapgrad.demo.workers import open_workers
from cheapgrad.environment import describe_environment
from cheapgrad.errors import MissingExtraError, check_count
from cheapgrad.files import prepare_directory, write_whole
from cheapgrad.reporting import DemoRecord, RecordDirectory, RecordFile, StepRecord, draw_scatter, render_page

if TYPE_CHECKING:
    from rich.console import Console

# More would need more memory than the time they save is worth.
_MOST_WORKERS = 4


@dataclass(frozen=True)
class DemoSettings:
    """How much the demo does.

    Attributes:
        seeds: trainings of every method, at least 1.
        draws: gradients drawn for variance and bias, at least 8.
        rounds: timed steps of every method, at least 1.
        quick: a few training steps only, to see that everything works; accuracies mean nothing then.
        strategies: what to compare with the exact method, if not the usual ones.
        setups: the networks.
        wide: a network of which only a step is timed.
        workers: processes that train and draw, at least 1; times are measured while they rest.
        command: what was typed, for those who want to do it again; None if nothing was.
    """

    seeds: int = 3
    draws: int = 256
    rounds: int = 20
    quick: bool = False
    strategies: tuple[Method, ...] = ()
    setups: tuple[Setup, ...] = SETUPS
    wide: Setup = WIDE
    workers: int = min(_MOST_WORKERS, os.cpu_count() or 1)
    command: str | None = None

    def __post_init__(self) -> None:
        check_count("seeds", self.seeds)
        check_count("draws", self.draws, minimum=8)
        check_count("rounds", self.rounds)
        check_count("workers", self.workers)


def run_demo(directory: Path, settings: DemoSettings, console: Console) -> DemoRecord:
    """Train the demo's networks by every method and leave ``demo.json``, ``demo.png`` and ``report.html``.

    Args:
        directory: where the files go; made if need be.
        settings: how much to do.
        console: a `rich.console.Console` for progress bars.

    Returns:
        What was found.

    Raises:
        OutputError: the directory cannot be written to; found before anything is trained.
        MissingExtraError: scikit-learn or matplotlib is not installed; found before anything is trained.
        BudgetError: a strategy does not fit a network; found before anything is trained.
    """
    start = time.perf_counter()
    prepare_directory(directory, "--out")
    _check_plotting()
    data = load_data()
    setups = tuple(make_quick(setup) if settings.quick else setup for setup in settings.setups)
    strategies = settings.strategies or make_default_methods()
    amounts = Amounts(settings.seeds, settings.draws, settings.rounds)
    with _one_thread(), torch.random.fork_rng(devices=[]):
        for setup in (*setups, settings.wide):
            check_methods(strategies, setup.build_seeded(0), setup.name)
        with open_workers(settings.workers) as workers, _progress(console) as add_bar:
            models = tuple(ModelRun(setup, strategies, data, amounts, workers, add_bar).run() for setup in setups)
            wide = _time_wide(settings, strategies, data, add_bar)
        environment = {**describe_environment(), "device": "cpu", "dtype": "float32", "workers": settings.workers}
    record = DemoRecord(
        data=data.description,
        seeds=tuple(range(settings.seeds)),
        seconds=time.perf_counter() - start,
        environment=environment,
        models=models,
        wide=wide,
        command=settings.command,
    )
    text = json.dumps(record.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    picture = draw_scatter(record)
    page = render_page(_describe_file(record), "cheapgrad demo")
    write_whole(directory / "demo.json", text.encode())
    write_whole(directory / "demo.png", picture)
    write_whole(directory / "report.html", page.encode())
    return record


def _describe_file(record: DemoRecord) -> RecordDirectory:
    """Return the record as `read_directory` would find it."""
    file = RecordFile(
        name="demo.json",
        kind="cheapgrad.demo",
        label="demo",
        record=record,
        environment=record.environment,
        seeds=record.seeds,
        command=record.command,
    )
    return RecordDirectory((file,), ())


def _time_wide(
    settings: DemoSettings, strategies: Sequence[Method], data: Digits, add_bar: AddBar
) -> tuple[StepRecord, ...]:
    methods = (EXACT, *strategies)
    rounds = 1 + settings.rounds // 6
    advance = add_bar(f"{settings.wide.name}: step times", rounds + WARM_UP_ROUNDS)
    seconds = time_steps(settings.wide, methods, data, rounds, advance)
    return tuple(
        StepRecord(settings.wide.description, method.label, method.kind, took, took / seconds[0])
        for method, took in zip(methods, seconds, strict=True)
    )


def _check_plotting() -> None:
    try:
        import matplotlib  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise MissingExtraError(
            "the demo's picture needs matplotlib, which is not installed; run: pip install 'cheapgrad[demo]'"
        ) from error


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[AddBar]:
    """Give a function that adds a progress bar and returns what advances it by one."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def add_bar(description: str, total: int) -> Callable[[], None]:
            if not console.is_terminal:
                # Bars are for terminals; in a log, a line says what is going on.
                console.print(f"{description} ...", highlight=False)
            task = progress.add_task(description, total=total)
            return lambda: progress.advance(task)

        yield add_bar
