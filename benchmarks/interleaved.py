"""Timing several things against each other on a machine that is not quiet."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.progress import track


@dataclass(frozen=True)
class Timing:
    """Medians of interleaved runs.

    Attributes:
        seconds: median time.
        ratio: median over the rounds of (this time / the reference's time of the same round).
        spread: half the distance between the quartiles of those ratios.
    """

    seconds: float
    ratio: float
    spread: float


def time_interleaved(
    functions: Mapping[str, Callable[[], object]], *, reference: str, rounds: int, label: str
) -> dict[str, Timing]:
    """Run all functions in turn, `rounds` times after one warm-up round, and compare them round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for current in track(range(rounds + 1), description=label, transient=True):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if current:
                seconds[name].append(time.perf_counter() - start)
    timings = {}
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds[reference], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        timings[name] = Timing(statistics.median(values), statistics.median(ratios), (high - low) / 2)
    return timings
