"""How many steps of exact training those of a method are worth, with exact trainings of fewer steps as the ruler."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.experiments.analysis import is_shorter, list_distinct
from benchmarks.experiments.results import Row, TaskResults
from benchmarks.experiments.statistics import summarise
from cheapgrad.auditing.student import student_band

_LEVEL = 0.95
# Row and loss on test data of each seed.
_Losses = dict[int, float]


@dataclass(frozen=True)
class Equivalent:
    """Steps of a method, divided by those of the exact training that ends with the same loss on test data.

    Attributes:
        ratio: of the mean losses. Below 1 the method ends better than exact training; beyond `longest` it ends worse
            than the shortest of the ruler: there it says that, and no more.
        low: end of the 95 % interval.
        high: end of the interval.
        longest: largest ratio that the ruler reaches.
        seeds: that method, exact training and ruler have in common.
    """

    ratio: float
    low: float
    high: float
    longest: float
    seeds: int


def measure_equivalent(results: TaskResults, row: Row) -> Equivalent | None:
    r"""Return the ratio of a method; None without a ruler of the same seeds, or where fewer steps end no worse.

    Each training has its whole schedule, so that nothing is read off the middle of one. The ruler is a curve through
    all exact trainings, ``loss − loss of all steps = a x + b x²``, x the logarithm of all steps ÷ steps, by least
    squares, a and b at least 0; losses below that of all steps are read off its mirror image. The interval
    is the jackknife's over the seeds of method, exact training and ruler together, in the logarithm, with Student's t.
    """
    exact = results.exact.collect("test_loss")
    ruler = [
        (math.log(results.exact.declaration["steps"] / each.declaration["steps"]), losses)
        for each in list_distinct(results.rows)
        if is_shorter(each) and not each.is_tuned and each.run_ids != results.exact.run_ids
        if set(losses := each.collect("test_loss")) >= set(exact)
    ]
    ours = row.collect("test_loss")
    seeds = sorted(set(exact) & set(ours))
    if not ruler or not seeds:
        return None
    whole = _find_share(exact, ours, ruler, seeds)
    if whole is None:
        return None
    steps = row.declaration["steps"] / results.exact.declaration["steps"]
    reach = _find_reach(exact, ours, ruler, seeds)
    return Equivalent(
        ratio=steps * math.exp(whole),
        low=steps * math.exp(whole - reach),
        high=steps * math.exp(whole + reach) if math.isfinite(reach) else math.inf,
        longest=steps * math.exp(max(share for share, _ in ruler)),
        seeds=len(seeds),
    )


def _find_reach(exact: _Losses, ours: _Losses, ruler: Sequence[tuple[float, _Losses]], seeds: Sequence[int]) -> float:
    """Return half the width of the interval, in the logarithm; infinite where it is unknown."""
    count = len(seeds)
    parts = [_find_share(exact, ours, ruler, [seed for seed in seeds if seed != left]) for left in seeds]
    known = [part for part in parts if part is not None]
    if count < 2 or len(known) < count:
        return math.inf
    _, deviation = summarise(known)
    return student_band(1 - _LEVEL, count - 1) * deviation * (count - 1) / math.sqrt(count)


def _find_share(
    exact: _Losses, ours: _Losses, ruler: Sequence[tuple[float, _Losses]], seeds: Sequence[int]
) -> float | None:
    """Return the logarithm of the ratio, as if both had the same number of steps; None without a curve."""
    if not seeds:
        return None

    def lose(losses: _Losses) -> float:
        return sum(losses[seed] - exact[seed] for seed in seeds) / len(seeds)

    slope, bend = _fit((share, lose(losses)) for share, losses in ruler)
    if slope == bend == 0:
        return None
    loss = lose(ours)
    size = abs(loss)
    # The root of a x + b x² = loss, without a difference of near numbers.
    root = 2 * size / (slope + math.sqrt(slope**2 + 4 * bend * size)) if size else 0.0
    return math.copysign(root, loss)


def _fit(points: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Return the a and b ≥ 0 of the least squares of ``loss − a x − b x²``.

    Losses scatter alike whatever x is: a training of hardly fewer steps says next to nothing about the slope.

    >>> [round(value, 9) for value in _fit([(1.0, 3.0), (2.0, 10.0)])]
    [1.0, 2.0]
    >>> _fit([(1.0, -3.0), (2.0, -10.0)])
    (0.0, 0.0)
    """
    pairs = list(points)
    squares, cubes, fourths = (sum(share**power for share, _ in pairs) for power in (2, 3, 4))
    products, bent = (sum(share**power * loss for share, loss in pairs) for power in (1, 2))
    determinant = squares * fourths - cubes**2
    straight = (max(0.0, products / squares), 0.0)
    # A single length, but for rounding, is a straight line.
    if determinant <= 1e-9 * squares * fourths:
        return straight
    slope, bend = (products * fourths - bent * cubes) / determinant, (bent * squares - products * cubes) / determinant
    if bend < 0:
        return straight
    return (slope, bend) if slope >= 0 else (0.0, max(0.0, bent / fourths))
