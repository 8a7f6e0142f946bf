"""Numbers as JSON can hold them, and ratios that are defined everywhere."""

from __future__ import annotations

import math
from typing import Any

_WORDS = {"inf", "-inf", "nan"}


def relative(value: float, whole: float) -> float:
    """Return `value` divided by `whole`; infinity where the whole is zero and the value is not."""
    if whole > 0:
        return value / whole
    return math.inf if value > 0 else 0.0


def plain(value: Any) -> Any:
    """Return plain lists, dictionaries and numbers; infinities become ``"inf"``, what is undefined ``"nan"``."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def restore(value: Any) -> Any:
    """Return what `plain` was called on, lists becoming tuples; dictionaries and records are left to the caller."""
    if isinstance(value, list):
        return tuple(restore(item) for item in value)
    return float(value) if isinstance(value, str) and value in _WORDS else value
