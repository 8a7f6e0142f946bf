"""Everything that the demo does with one network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch.nn import functional

from cheapgrad.cost import measure_held_bytes, scan
from cheapgrad.demo.data import Digits
from cheapgrad.demo.methods import CHECKPOINT, EXACT, Method
from cheapgrad.demo.noise import Noise
from cheapgrad.demo.setups import Setup
from cheapgrad.demo.tasks import measure_noise, train_and_test, train_half_way
from cheapgrad.demo.timing import WARM_UP_ROUNDS, find_batch_size, make_batch_ladder, time_steps
from cheapgrad.demo.training import compute_loss
from cheapgrad.demo.workers import Workers
from cheapgrad.reporting import HeldRecord, MethodRecord, ModelRecord, TensorRecord

AddBar = Callable[[str, int], Callable[[], None]]


@dataclass(frozen=True)
class Amounts:
    """How much is done with a network.

    Attributes:
        seeds: trainings of every method.
        draws: gradients drawn for variance and bias.
        rounds: timed steps of every method.
    """

    seeds: int
    draws: int
    rounds: int


@dataclass(frozen=True)
class _Gradient:
    """Cost and noise of one method's gradient."""

    step_seconds: float
    step_time_fraction: float
    noise: Noise

    @property
    def cost_times_noise(self) -> float:
        return self.step_time_fraction * (1 + self.noise.fraction)


class ModelRun:
    """Times, draws, trains and tests one network by every method.

    Args:
        setup: the network and how it is trained.
        strategies: what to compare with the exact method.
        data: the pictures.
        amounts: how much to do.
        workers: who draws and trains; times are measured here, while they rest.
        add_bar: takes a description and a total, and returns what advances the progress by one.
    """

    def __init__(
        self,
        setup: Setup,
        strategies: Sequence[Method],
        data: Digits,
        amounts: Amounts,
        workers: Workers,
        add_bar: AddBar,
    ) -> None:
        self._setup, self._strategies, self._data, self._amounts = setup, tuple(strategies), data, amounts
        self._workers, self._add_bar = workers, add_bar
        # Where variance and bias are measured.
        self._weights = train_half_way(setup)

    def run(self) -> ModelRecord:
        """Do everything and return what was found."""
        gradients = self._measure_gradients()
        held_bytes = [self._measure_bytes(method) for method in gradients]
        accuracies = self._train(list(gradients))
        records = [
            replace(
                _make_record(method, self._batch_size(method), gradient, held, held / held_bytes[0], right),
                held=self._list_held(method),
            )
            for (method, gradient), held, right in zip(gradients.items(), held_bytes, accuracies, strict=True)
        ]
        return ModelRecord(
            name=self._setup.name,
            description=self._setup.description,
            parameters=sum(parameter.numel() for parameter in self._setup.build_seeded(0).parameters()),
            training_steps=self._setup.steps,
            batch_size=self._setup.batch_size,
            audit_batch_size=self._setup.audit_batch_size,
            methods=tuple(records),
        )

    def _batch_size(self, method: Method) -> int:
        return method.batch_size or self._setup.batch_size

    def _measure_gradients(self) -> dict[Method, _Gradient]:
        """Measure the exact method, checkpointing, batches of equal step time, and the strategies, in this order."""
        exact_methods = (EXACT, *make_batch_ladder(self._setup))
        checkpoint_time, *seconds = self._time((CHECKPOINT, *exact_methods, *self._strategies), "step times")
        exact_times, strategy_times = seconds[: len(exact_methods)], seconds[len(exact_methods) :]
        exact_noise, checkpoint_noise, *noises = self._measure_noise(
            (EXACT, CHECKPOINT, *self._strategies), "variance and bias"
        )
        strategies = {
            method: _Gradient(took, took / exact_times[0], noise)
            for method, took, noise in zip(self._strategies, strategy_times, noises, strict=True)
        }
        sizes = [self._batch_size(method) for method in exact_methods]
        batches = self._match_batches(strategies, list(zip(sizes, exact_times, strict=True)))
        return {
            EXACT: _Gradient(exact_times[0], 1.0, exact_noise),
            CHECKPOINT: _Gradient(checkpoint_time, checkpoint_time / exact_times[0], checkpoint_noise),
            **self._measure_batches(batches),
            **strategies,
        }

    def _match_batches(
        self, strategies: dict[Method, _Gradient], measured: Sequence[tuple[int, float]]
    ) -> tuple[Method, ...]:
        """Return exact methods on batches whose step takes as long as that of the best strategy at each budget.

        The best is the one with the smallest ``c(1 + ω)``. A batch of the usual size is left out: that is the exact
        method itself.
        """
        batches: dict[int, Method] = {}
        for budget in sorted({method.budget for method in strategies}):
            rivals = [method for method in strategies if method.budget == budget]
            best = min(rivals, key=lambda method: strategies[method].cost_times_noise)
            size = find_batch_size(strategies[best].step_seconds, measured)
            remark = f"its step takes as long as that of {best.label}"
            batches.setdefault(size, Method(f"batch of {size}", "batch", batch_size=size, remark=remark))
        batches.pop(self._setup.batch_size, None)
        return tuple(batches.values())

    def _measure_batches(self, batches: tuple[Method, ...]) -> dict[Method, _Gradient]:
        if not batches:
            return {}
        exact_seconds, *seconds = self._time((EXACT, *batches), "batches of equal step time")
        noises = self._measure_noise(batches, "their variance")
        return {
            method: _Gradient(took, took / exact_seconds, noise)
            for method, took, noise in zip(batches, seconds, noises, strict=True)
        }

    def _time(self, methods: Sequence[Method], what: str) -> list[float]:
        rounds = self._amounts.rounds
        advance = self._add_bar(f"{self._setup.name}: {what}", rounds + WARM_UP_ROUNDS)
        return time_steps(self._setup, methods, self._data, rounds, advance)

    def _measure_noise(self, methods: Sequence[Method], what: str) -> list[Noise]:
        advance = self._add_bar(f"{self._setup.name}: {what}", len(methods))
        draws = self._amounts.draws
        tasks = [partial(measure_noise, self._setup, method, self._weights, draws) for method in methods]
        return self._workers.run(tasks, advance)

    def _measure_bytes(self, method: Method) -> int:
        model = self._setup.build_seeded(0).train()
        method.convert(model)
        batch = slice(self._batch_size(method))
        pictures, classes = self._data.train_pictures[batch], self._data.train_classes[batch]
        # The batch itself is there anyway, like the parameters.
        held = measure_held_bytes(lambda: compute_loss(model, pictures, classes), exclude=[model, pictures, classes])
        return held.total_bytes

    def _list_held(self, method: Method) -> tuple[HeldRecord, ...]:
        model = self._setup.build_seeded(0).train()
        method.convert(model)
        batch = slice(self._batch_size(method))
        # Copies: a view would keep, and count as, the whole data set.
        pictures, classes = self._data.train_pictures[batch].clone(), self._data.train_classes[batch].clone()
        report = scan(model, pictures, loss=partial(functional.cross_entropy, target=classes))
        return tuple(
            HeldRecord(cost.module, cost.operation, cost.saved_bytes) for cost in report.operations if cost.saved_bytes
        )

    def _train(self, methods: Sequence[Method]) -> list[tuple[float, ...]]:
        seeds = range(self._amounts.seeds)
        tasks = [partial(train_and_test, self._setup, method, seed) for method in methods for seed in seeds]
        accuracies = self._workers.run(tasks, self._add_bar(f"{self._setup.name}: training", len(tasks)))
        return [tuple(accuracies[start : start + len(seeds)]) for start in range(0, len(tasks), len(seeds))]


def _make_record(
    method: Method,
    batch_size: int,
    gradient: _Gradient,
    held_bytes: int,
    held_bytes_fraction: float,
    accuracies: tuple[float, ...],
) -> MethodRecord:
    moments = gradient.noise.moments
    return MethodRecord(
        label=method.label,
        kind=method.kind,
        family=method.family,
        stored=None if method.stored is None else repr(method.stored),
        cotangent=None if method.cotangent is None else repr(method.cotangent),
        batch_size=batch_size,
        accuracies=accuracies,
        step_seconds=gradient.step_seconds,
        step_time_fraction=gradient.step_time_fraction,
        held_bytes=held_bytes,
        held_bytes_fraction=held_bytes_fraction,
        predicted_relative_variance=gradient.noise.predicted,
        noise_fraction=gradient.noise.fraction,
        remark=method.remark,
        draws=0 if moments is None else moments.draws,
        measured_relative_variance=None if moments is None else moments.relative_variance,
        measured_relative_variance_standard_error=None if moments is None else moments.relative_variance_standard_error,
        max_abs_z=None if moments is None else moments.max_abs_z,
        band=None if moments is None else moments.band,
        detectable_relative_bias=None if moments is None else moments.detectable_relative_bias,
        unbiased=moments is None or moments.unbiased,
        tensors=_make_tensor_records(gradient.noise),
    )


def _make_tensor_records(noise: Noise) -> tuple[TensorRecord, ...]:
    if noise.moments is None:
        return ()
    return tuple(
        TensorRecord(
            name=tensor.name,
            relative_variance=tensor.relative_variance,
            noise_fraction=fraction,
            max_abs_z=tensor.max_abs_z,
            detectable_relative_bias=tensor.detectable_relative_bias,
        )
        for tensor, fraction in zip(noise.moments.tensors, noise.tensor_fractions, strict=True)
    )
