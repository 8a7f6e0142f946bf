"""The two-sided band of Student's t distribution, far into its tails."""

from __future__ import annotations

import math

from cheapgrad.errors import BudgetError, check_count

_TINY = 1e-300


def student_band(probability: float, degrees: int) -> float:
    """Return t with ``P(|T| > t) = probability`` for Student's T with `degrees` degrees of freedom.

    ``P(|T| > t) = I_x(degrees / 2, 1 / 2)`` at ``x = degrees / (degrees + t²)``, where I is the regularised incomplete
    beta function; t is found by bisection.

    Args:
        probability: of a false alarm, both sides together, in (0, 1).
        degrees: degrees of freedom, at least 1.

    Returns:
        The band, a positive number.

    Law:
        Relative error below 1e-9 for probabilities down to 1e-100.

    Raises:
        BudgetError: the probability lies outside (0, 1), or the degrees are no positive whole number.

    Example:
        >>> round(student_band(0.05, 10), 3)
        2.228

    References:
        The continued fraction is 26.5.8 of Abramowitz and Stegun (1964), evaluated by Lentz's method.
    """
    check_count("degrees", degrees)
    if not 0 < probability < 1:
        raise BudgetError(f"probability must be in (0, 1), but got {probability!r}; use e.g. 1e-6")
    low, high = -50.0, 1.0
    while _two_sided_tail(math.exp(high), degrees) > probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if _two_sided_tail(math.exp(middle), degrees) > probability:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def _two_sided_tail(t: float, degrees: int) -> float:
    return _incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t), t * t / (degrees + t * t))


def _incomplete_beta(a: float, b: float, x: float, one_minus_x: float) -> float:
    """Return the regularised incomplete beta function; `one_minus_x` is given apart, so that no digits are lost."""
    if x <= 0 or one_minus_x <= 0:
        return 0.0 if x <= 0 else 1.0
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(one_minus_x)
    # The fraction converges fast on this side only; the other side is one minus its mirror image.
    if x > (a + 1) / (a + b + 2):
        return 1 - math.exp(log_front) / b * _continued_fraction(b, a, one_minus_x)
    return math.exp(log_front) / a * _continued_fraction(a, b, x)


def _continued_fraction(a: float, b: float, x: float) -> float:
    c, d = 1.0, 1 / _away_from_zero(1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        step = 1.0
        for numerator in (even, odd):
            d = 1 / _away_from_zero(1 + numerator * d)
            c = _away_from_zero(1 + numerator / c)
            step = c * d
            fraction *= step
        if abs(step - 1) < 1e-15:
            break
    return fraction


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
