"""Paired comparisons over seeds."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cheapgrad.auditing.student import student_band


@dataclass(frozen=True)
class Comparison:
    """A mean difference over pairs, with a confidence interval and a two-sided p-value of Student's t.

    Attributes:
        mean: of the differences.
        low: end of the interval.
        high: end of the interval.
        p_value: for a mean of zero; NaN for fewer than two pairs.
        pairs: how many.
    """

    mean: float
    low: float
    high: float
    p_value: float
    pairs: int


def compare_paired(first: Mapping[int, float], second: Mapping[int, float], level: float = 0.95) -> Comparison:
    """Compare two methods over the seeds that both have.

    Differences ``first − second``; mean ± t · s / √n. It assumes that differences over seeds are near normal: with five
    of them nothing else (signs, ranks) can go below p = 0.05.

    Args:
        first: value of each seed.
        second: the same, of what it is compared with.
        level: of the interval.

    Raises:
        ValueError: if the two have no seed in common.

    >>> compare_paired({0: 1.0, 1: 2.0, 2: 3.5}, {0: 0.5, 1: 1.0, 2: 2.0}).mean
    1.0
    """
    seeds = sorted(set(first) & set(second))
    if not seeds:
        raise ValueError(f"no seed is in both: {sorted(first)} and {sorted(second)}")
    differences = [first[seed] - second[seed] for seed in seeds]
    mean, deviation = summarise(differences)
    count = len(differences)
    if count < 2:
        return Comparison(mean, -math.inf, math.inf, math.nan, count)
    error = deviation / math.sqrt(count)
    reach = _student_band(1 - level, count - 1) * error
    return Comparison(mean, mean - reach, mean + reach, _two_sided_p(mean, error, count - 1), count)


@functools.cache
def _student_band(outside: float, degrees: int) -> float:
    return student_band(outside, degrees)


def summarise(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation (NaN for a single value)."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def correct_for_many(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return Holm's adjusted p-values: for the chance of a single false finding among all of them.

    >>> correct_for_many({"a": 0.01, "b": 0.04})
    {'a': 0.02, 'b': 0.04}
    """
    ordered = sorted((value, name) for name, value in p_values.items() if not math.isnan(value))
    adjusted, highest = dict(p_values), 0.0
    for position, (value, name) in enumerate(ordered):
        highest = max(highest, min(1.0, value * (len(ordered) - position)))
        adjusted[name] = highest
    return adjusted


def _two_sided_p(mean: float, error: float, degrees: int) -> float:
    """Return ``P(|T| > |mean| / error)`` for Student's T."""
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    angle = math.atan(abs(mean) / error / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    # Finite sums for whole degrees: Abramowitz and Stegun (1964), 26.7.3 and 26.7.4.
    is_odd = degrees % 2 == 1
    term = cosine if is_odd else 1.0
    total = 0.0 if degrees == 1 else term
    for index in range(3 if is_odd else 2, degrees - 1, 2):
        term *= (index - 1) / index * cosine**2
        total += term
    inside = 2 / math.pi * (angle + sine * total) if is_odd else sine * total
    return max(0.0, 1 - inside)
