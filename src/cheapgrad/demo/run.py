"""The demo from beginning to end."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cheapgrad.cost import measure_held_bytes
from cheapgrad.demo.data import Digits, load_data
from cheapgrad.demo.environment import describe_environment
from cheapgrad.demo.files import prepare_directory, write_whole
from cheapgrad.demo.methods import EXACT, Method, check_methods, make_default_methods
from cheapgrad.demo.noise import Noise, NoiseMeter
from cheapgrad.demo.setups import SETUPS, Setup, make_quick
from cheapgrad.demo.timing import WARM_UP_ROUNDS, find_batch_size, make_batch_ladder, time_steps
from cheapgrad.demo.training import compute_loss, measure_accuracy, train
from cheapgrad.errors import MissingExtraError, check_count
from cheapgrad.reporting import DemoRecord, MethodRecord, ModelRecord, draw_scatter

if TYPE_CHECKING:
    from rich.console import Console

# More threads than this only wait for each other on layers this small, and results would compare less well.
_MOST_THREADS = 2


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
    """

    seeds: int = 3
    draws: int = 256
    rounds: int = 30
    quick: bool = False
    strategies: tuple[Method, ...] = ()
    setups: tuple[Setup, ...] = SETUPS

    def __post_init__(self) -> None:
        check_count("seeds", self.seeds)
        check_count("draws", self.draws, minimum=8)
        check_count("rounds", self.rounds)


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
    with _few_threads(), torch.random.fork_rng(devices=[]):
        for setup in setups:
            check_methods(strategies, setup.build_seeded(0), setup.name)
        with _progress(console) as add_bar:
            models = tuple(_ModelRun(setup, strategies, data, settings, add_bar).run() for setup in setups)
        environment = describe_environment()
    record = DemoRecord(
        data=data.description,
        seeds=tuple(range(settings.seeds)),
        seconds=time.perf_counter() - start,
        environment=environment,
        models=models,
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
        self, setup: Setup, strategies: Sequence[Method], data: Digits, settings: DemoSettings, add_bar: AddBar
    ) -> None:
        self.setup, self.strategies, self.data, self.settings = setup, tuple(strategies), data, settings
        self.add_bar = add_bar

    def run(self) -> ModelRecord:
        batches = self._match_batches()
        methods = (EXACT, *batches, *self.strategies)
        seconds = self._time(methods, "step times")
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

    def _time(self, methods: Sequence[Method], what: str) -> list[float]:
        rounds = self.settings.rounds
        advance = self.add_bar(f"{self.setup.name}: {what}", rounds + WARM_UP_ROUNDS)
        return time_steps(self.setup, methods, self.data, rounds, advance)

    def _match_batches(self) -> list[Method]:
        """Return exact methods on batches whose step takes as long as that of the fastest strategy at each budget."""
        ladder = make_batch_ladder(self.setup)
        times = self._time((EXACT, *ladder, *self.strategies), "equal batches")
        sizes = [self.setup.batch_size, *(method.batch_size or 0 for method in ladder)]
        measured = list(zip(sizes, times[: len(sizes)], strict=True))
        strategy_times = list(zip(times[len(sizes) :], self.strategies, strict=True))
        found: dict[int, Method] = {}
        for budget in sorted({method.budget for method in self.strategies}):
            took, fastest = min(
                ((took, method) for took, method in strategy_times if method.budget == budget), key=lambda pair: pair[0]
            )
            size = find_batch_size(took, measured)
            found.setdefault(
                size,
                replace(
                    EXACT,
                    label=f"batch of {size}",
                    family="batch",
                    budget=budget,
                    batch_size=size,
                    remark=f"its step takes as long as that of {fastest.label}",
                ),
            )
        return list(found.values())

    def _measure_noise(self, methods: Sequence[Method]) -> list[Noise]:
        """Measure variances and biases after one exact pass over the data."""
        draws, size = self.settings.draws, self.setup.audit_batch_size
        advance = self.add_bar(f"{self.setup.name}: variance and bias", draws * len(methods))
        one_pass = len(self.data.train_classes) // self.setup.batch_size
        model = train(self.setup, EXACT, self.data, seed=0, on_step=lambda: None, steps=one_pass)
        meter = NoiseMeter(self.setup, model, self.data.train_pictures[:size], self.data.train_classes[:size])
        return [meter.measure(method, draws, advance) for method in methods]

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
        advance = self.add_bar(f"{self.setup.name}: training", len(methods) * len(seeds) * self.setup.steps)
        return [
            tuple(measure_accuracy(train(self.setup, method, self.data, seed, advance), self.data) for seed in seeds)
            for method in methods
        ]


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


def _check_plotting() -> None:
    try:
        import matplotlib  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise MissingExtraError(
            "the demo's picture needs matplotlib, which is not installed; run: pip install 'cheapgrad[demo]'"
        ) from error


@contextlib.contextmanager
def _few_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, _MOST_THREADS))
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
