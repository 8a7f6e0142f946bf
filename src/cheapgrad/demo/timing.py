"""Time of a training step, measured so that a busy machine is unfair to nobody."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from cheapgrad.demo.data import Digits
from cheapgrad.demo.methods import EXACT, Method
from cheapgrad.demo.setups import Setup
from cheapgrad.demo.training import make_optimizer, make_step

# Rounds before the clock counts: allocations, lazily made optimizer state, first draws.
WARM_UP_ROUNDS = 2


def time_steps(
    setup: Setup, methods: Sequence[Method], data: Digits, rounds: int, on_round: Callable[[], object]
) -> list[float]:
    """Return the median time in seconds of a training step of each method.

    All methods take one step in every round, each time in another order, so that what slows the machine down for a
    while slows down all of them alike.

    Args:
        setup: the network.
        methods: what to compare.
        data: the pictures; every method sees the same ones.
        rounds: steps timed for each method.
        on_round: called after every round, the warm-up included.
    """
    steps = [_make_timed_step(setup, method, data) for method in methods]
    seconds: list[list[float]] = [[] for _ in methods]
    order = list(range(len(methods)))
    shuffle = random.Random(0).shuffle
    for current in range(rounds + WARM_UP_ROUNDS):
        shuffle(order)
        for position in order:
            start = time.perf_counter()
            steps[position]()
            if current >= WARM_UP_ROUNDS:
                seconds[position].append(time.perf_counter() - start)
        on_round()
    return [statistics.median(times) for times in seconds]


def _make_timed_step(setup: Setup, method: Method, data: Digits) -> Callable[[], None]:
    model = setup.build_seeded(0).train()
    method.convert(model)
    step = make_step(model, make_optimizer(model, setup.learning_rate))
    size = method.batch_size or setup.batch_size
    pictures, classes = data.train_pictures[:size].clone(), data.train_classes[:size].clone()
    return lambda: step(pictures, classes)


def make_batch_ladder(setup: Setup) -> list[Method]:
    """Return exact methods on batches of half to one and a half times the usual size, to read off equal step times."""
    sizes = [setup.batch_size * quarters // 4 for quarters in (2, 3, 6)]
    return [replace(EXACT, label=f"batch of {size}", family="batch", batch_size=size) for size in sizes]


def find_batch_size(step_seconds: float, measured: Sequence[tuple[int, float]]) -> int:
    """Return the batch size whose step takes that long, by interpolation between measured ones.

    Args:
        step_seconds: time of a step.
        measured: pairs of batch size and time of a step, at least two.

    Returns:
        A batch size within the range of the measured ones.
    """
    points = sorted(measured)
    for (size, seconds), (next_size, next_seconds) in itertools.pairwise(points):
        if step_seconds <= max(seconds, next_seconds):
            share = (step_seconds - seconds) / (next_seconds - seconds) if next_seconds > seconds else 0.0
            return round(size + min(max(share, 0.0), 1.0) * (next_size - size))
    return points[-1][0]
