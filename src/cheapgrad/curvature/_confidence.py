"""Intervals from few micro-batches: the quantile of Student's t."""

from __future__ import annotations

import math
from statistics import NormalDist

from cheapgrad.errors import BudgetError

# Above this the normal quantile is right to four digits.
_MANY_DEGREES = 2000


def check_level(level: float) -> float:
    """Return `level` if it is a probability strictly between 0 and 1; raise `BudgetError` otherwise."""
    if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 < level < 1:
        raise BudgetError(f"level must be in (0, 1), but got {level!r}; use e.g. level=0.95")
    return float(level)


def student_quantile(level: float, degrees: int) -> float:
    """Return t with ``P(|T| ≤ t) = level`` for Student's T; infinite without a degree of freedom.

    The probability is the finite sum of powers of ``cos θ``, ``θ = arctan(t / √degrees)``, of Abramowitz and Stegun
    (1964), 26.7.3 and 26.7.4; θ is found by bisection.
    """
    if degrees < 1:
        return math.inf
    if degrees > _MANY_DEGREES:
        return NormalDist().inv_cdf((1 + level) / 2)
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _central_probability(middle, degrees) < level else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _central_probability(angle: float, degrees: int) -> float:
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    for power in range(2 + odd, degrees - 1, 2):
        term *= cosine**2 * (power - 1) / power
        total += term
    if not odd:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if degrees > 1 else 0.0))
