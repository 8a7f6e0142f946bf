"""The exact confidence interval of a probability, from a count."""

from __future__ import annotations

import math
from collections.abc import Callable

from cheapgrad.errors import BudgetError


def clopper_pearson(successes: int, trials: int, confidence: float) -> tuple[float, float]:
    """Return the interval in which the probability lies with at least the given confidence.

    Its ends are the probabilities under which so many successes or more, or so few or less, have chance
    ``(1 - confidence) / 2``.

    Raises:
        BudgetError: `confidence` is not in (0, 1).

    >>> low, high = clopper_pearson(0, 100, 0.95)
    >>> low, round(high, 4)
    (0.0, 0.0362)

    References:
        Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial",
        Biometrika 26 (1934).
    """
    if not 0 < confidence < 1:
        raise BudgetError(f"confidence must be in (0, 1), but got {confidence!r}; use e.g. 0.95")
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else _solve(lambda p: _at_least(successes, trials, p), tail)
    # So few successes are so many failures.
    failures = trials - successes
    high = 1.0 if failures == 0 else 1 - _solve(lambda p: _at_least(failures, trials, p), tail)
    return low, high


def _at_least(successes: int, trials: int, probability: float) -> float:
    """Return the chance of `successes` or more."""
    if successes <= trials // 2:
        return 1 - math.fsum(_chance(count, trials, probability) for count in range(successes))
    return math.fsum(_chance(count, trials, probability) for count in range(successes, trials + 1))


def _chance(count: int, trials: int, probability: float) -> float:
    if probability in {0.0, 1.0}:
        return float(count == trials * probability)
    log_ways = math.lgamma(trials + 1) - math.lgamma(count + 1) - math.lgamma(trials - count + 1)
    return math.exp(log_ways + count * math.log(probability) + (trials - count) * math.log1p(-probability))


def _solve(rising: Callable[[float], float], level: float) -> float:
    """Return where a rising function on [0, 1] passes `level`."""
    low, high = 0.0, 1.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < level else (low, middle)
    return (low + high) / 2
