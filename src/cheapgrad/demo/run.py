"""The demo from beginning to end."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cheapgrad.cost import measure_held_bytes
from cheapgrad.demo.data import Digits, load_data
from cheapgrad.demo.environment import describe_environment
from cheapgrad.demo.files import prepare_directory, write_whole
from cheapgrad.demo.methods import EXACT, Method, check_methods, make_default_methods
from cheapgrad.demo.noise import Noise
from cheapgrad.demo.setups import SETUPS, WIDE, Setup, make_quick
from cheapgrad.demo.tasks import measure_noise, train_and_test, train_half_way
from cheapgrad.demo.timing import WARM_UP_ROUNDS, find_batch_size, make_batch_ladder, time_steps
from cheapgrad.demo.training import compute_loss
from cheapgrad.demo.workers import Workers, open_workers
from cheapgrad.errors import MissingExtraError, check_count
from cheapgrad.reporting import DemoRecord, MethodRecord, ModelRecord, StepRecord, draw_scatter

if TYPE_CHECKING:
    from rich.console import Console

_MOST_WORKERS = 2


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
    """

    seeds: int = 3
    draws: int = 256
    rounds: int = 20
    quick: bool = False
    strategies: tuple[Method, ...] = ()
    setups: tuple[Setup, ...] = SETUPS
    wide: Setup = WIDE
    workers: int = min(_MOST_WORKERS, os.cpu_count() or 1)

    def __post_init__(self) -> None:
        check_count("seeds", self.seeds)
        check_count("draws", self.draws, minimum=8)
        check_count("rounds", self.rounds)
        check_count("workers", self.workers)


def run_demo(directory: Path, settings: DemoSettings, console: Console) -> DemoRecord:
    """Train the demo's networks by every method and leave ``demo.json`` and ``demo.png``.

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
    prepare_directory(directory)
    _check_plotting()
    data = load_data()
    setups = tuple(make_quick(setup) if settings.quick else setup for setup in settings.setups)
    strategies = settings.strategies or make_default_methods()
    with _one_thread(), torch.random.fork_rng(devices=[]):
        for setup in (*setups, settings.wide):
            check_methods(strategies, setup.build_seeded(0), setup.name)
        with open_workers(settings.workers) as workers, _progress(console) as add_bar:
            models = tuple(_ModelRun(setup, strategies, data, settings, workers, add_bar).run() for setup in setups)
            wide = _time_wide(settings, strategies, data, add_bar)
        environment = {**describe_environment(), "workers": settings.workers}
    record = DemoRecord(
        data=data.description,
        seeds=tuple(range(settings.seeds)),
        seconds=time.perf_counter() - start,
        environment=environment,
        models=models,
        wide=wide,
    )
    text = json.dumps(record.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    picture = draw_scatter(record)
    write_whole(directory / "demo.json", text.encode())
    write_whole(directory / "demo.png", picture)
    return record


AddBar = Callable[[str, int], Callable[[], None]]


class _ModelRun:
    """Everything that is done with one network."""

    def __init__(
        self,
        setup: Setup,
        strategies: Sequence[Method],
        data: Digits,
        settings: DemoSettings,
        workers: Workers,
        add_bar: AddBar,
    ) -> None:
        self.setup, self.strategies, self.data, self.settings = setup, tuple(strategies), data, settings
        self.workers, self.add_bar = workers, add_bar

    def run(self) -> ModelRecord:
        methods = (*self._match_batches(), *self.strategies)
        seconds = self._time(methods, "step times", self.settings.rounds)
        noises = self._measure_noise(methods)
        held = [self._measure_bytes(method) for method in methods]
        accuracies = self._train(methods)
        records = [
            _make_record(
                method,
                _Figures(took, took / seconds[0], size, size / held[0], right),
                noise,
                method.batch_size or self.setup.batch_size,
            )
            for method, took, noise, size, right in zip(methods, seconds, noises, held, accuracies, strict=True)
        ]
        return ModelRecord(
            name=self.setup.name,
            description=self.setup.description,
            parameters=sum(parameter.numel() for parameter in self.setup.build_seeded(0).parameters()),
            training_steps=self.setup.steps,
            batch_size=self.setup.batch_size,
            audit_batch_size=self.setup.audit_batch_size,
            methods=tuple(records),
        )

    def _time(self, methods: Sequence[Method], what: str, rounds: int) -> list[float]:
        advance = self.add_bar(f"{self.setup.name}: {what}", rounds + WARM_UP_ROUNDS)
        return time_steps(self.setup, methods, self.data, rounds, advance)

    def _match_batches(self) -> tuple[Method, ...]:
        """Return the exact method, on its usual batch and on those whose step takes as long as the fastest strategies'.

        There is one for each budget, and none where that is the usual batch.
        """
        ladder = make_batch_ladder(self.setup)
        # Only the size of a batch depends on these times, so a third of the rounds will do.
        times = self._time((EXACT, *ladder, *self.strategies), "equal batches", 1 + self.settings.rounds // 3)
        sizes = [self.setup.batch_size, *(method.batch_size or 0 for method in ladder)]
        measured = list(zip(sizes, times[: len(sizes)], strict=True))
        strategy_times = list(zip(times[len(sizes) :], self.strategies, strict=True))
        found = {self.setup.batch_size: EXACT}
        for budget in sorted({method.budget for method in self.strategies}):
            took, fastest = min(
                ((took, method) for took, method in strategy_times if method.budget == budget), key=lambda pair: pair[0]
            )
            size = find_batch_size(took, measured)
            method = Method(f"batch of {size}", family="batch", batch_size=size)
            remark = f"its step takes as long as that of {fastest.label}"
            found[size] = replace(found.get(size, method), remark=remark)
        return tuple(found.values())

    def _measure_noise(self, methods: Sequence[Method]) -> list[Noise]:
        weights = train_half_way(self.setup)
        advance = self.add_bar(f"{self.setup.name}: variance and bias", len(methods))
        tasks = [partial(measure_noise, self.setup, method, weights, self.settings.draws) for method in methods]
        return self.workers.run(tasks, advance)

    def _measure_bytes(self, method: Method) -> int:
        model = self.setup.build_seeded(0).train()
        method.convert(model)
        size = method.batch_size or self.setup.batch_size
        pictures, classes = self.data.train_pictures[:size], self.data.train_classes[:size]
        # The batch itself is there anyway, like the parameters.
        held = measure_held_bytes(lambda: compute_loss(model, pictures, classes), exclude=[model, pictures, classes])
        return held.total_bytes

    def _train(self, methods: Sequence[Method]) -> list[tuple[float, ...]]:
        seeds = range(self.settings.seeds)
        tasks = [partial(train_and_test, self.setup, method, seed) for method in methods for seed in seeds]
        accuracies = self.workers.run(tasks, self.add_bar(f"{self.setup.name}: training", len(tasks)))
        return [tuple(accuracies[start : start + len(seeds)]) for start in range(0, len(tasks), len(seeds))]


@dataclass(frozen=True)
class _Figures:
    """Figures of one method that its record takes over as they are."""

    step_seconds: float
    step_time_fraction: float
    held_bytes: int
    held_bytes_fraction: float
    accuracies: tuple[float, ...]


def _make_record(method: Method, figures: _Figures, noise: Noise, batch_size: int) -> MethodRecord:
    moments = noise.moments
    return MethodRecord(
        label=method.label,
        kind=method.kind,
        family=method.family,
        stored=None if method.stored is None else repr(method.stored),
        cotangent=None if method.cotangent is None else repr(method.cotangent),
        batch_size=batch_size,
        **vars(figures),
        predicted_relative_variance=noise.predicted,
        noise_fraction=noise.fraction,
        remark=method.remark,
        draws=0 if moments is None else moments.draws,
        measured_relative_variance=None if moments is None else moments.relative_variance,
        measured_relative_variance_standard_error=None if moments is None else moments.relative_variance_standard_error,
        max_abs_z=None if moments is None else moments.max_abs_z,
        band=None if moments is None else moments.band,
        detectable_relative_bias=None if moments is None else moments.detectable_relative_bias,
        unbiased=moments is None or moments.unbiased,
    )


def _time_wide(
    settings: DemoSettings, strategies: Sequence[Method], data: Digits, add_bar: AddBar
) -> tuple[StepRecord, ...]:
    methods = (EXACT, *strategies)
    rounds = 1 + settings.rounds // 4
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
