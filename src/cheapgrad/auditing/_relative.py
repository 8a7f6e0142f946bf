"""Ratios that are defined everywhere."""

from __future__ import annotations

import math


def relative(value: float, whole: float) -> float:
    """Return `value` divided by `whole`; infinity where the whole is zero and the value is not."""
    if whole > 0:
        return value / whole
    return math.inf if value > 0 else 0.0
