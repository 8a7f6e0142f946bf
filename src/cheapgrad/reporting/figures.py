"""Numbers as people read them; what is unknown, infinite or undefined is said in words."""

from __future__ import annotations

import math
from collections.abc import Callable

from cheapgrad.cost.units import format_bytes as _format_bytes

Format = Callable[[float], str]
UNKNOWN = "–"


def format_figure(value: float | None, write: Format) -> str:
    """Return a number for people: a dash where it is unknown, a word where it is no finite number.

    Args:
        value: the number, or None.
        write: how a finite number is written.

    >>> format_figure(math.inf, format_plain), format_figure(None, format_plain)
    ('∞', '–')
    """
    if value is None:
        return UNKNOWN
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return write(value)


def format_plain(value: float) -> str:
    """Return three significant digits.

    >>> format_plain(0.000123456), format_plain(12.345), format_plain(0), format_plain(-1234.5)
    ('0.000123', '12.3', '0', '-1,234')
    """
    if value == 0:
        return "0"
    if abs(value) >= 1e7 or abs(value) < 1e-4:
        return f"{value:.2e}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def format_percent(value: float) -> str:
    """Return a fraction as a percentage.

    >>> format_percent(0.9786)
    '97.9 %'
    """
    return f"{100 * value:.1f} %"


def format_share(value: float) -> str:
    """Return what is left of the exact figure, as a number of two decimals.

    >>> format_share(0.666)
    '0.67'
    """
    return f"{value:.2f}"


def format_seconds(value: float) -> str:
    """Return a time.

    >>> format_seconds(0.0204), format_seconds(95.4)
    ('20.4 ms', '95.4 s')
    """
    if value < 1e-3:
        return f"{1e6 * value:.1f} µs"
    return f"{1e3 * value:.1f} ms" if value < 1 else f"{value:.1f} s"


def format_bytes(value: float) -> str:
    """Return a number of bytes.

    >>> format_bytes(3 * 2**20)
    '3.00 MiB'
    """
    return _format_bytes(value)


def format_z(value: float) -> str:
    """Return a z-score.

    >>> format_z(4.4567)
    '4.46'
    """
    return f"{value:.2f}"
