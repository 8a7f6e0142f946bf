"""Bytes and FLOPs in the units people read."""

from __future__ import annotations


def format_bytes(count: float | None) -> str:
    """Return bytes in the unit people read, a dash if unknown.

    >>> format_bytes(3 * 2**20)
    '3.00 MiB'
    """
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return "-"


def format_flops(count: float | None) -> str:
    """Return FLOPs in the unit people read, a dash if unknown.

    >>> format_flops(2.5e9)
    '2.50 GFLOP'
    >>> format_flops(640)
    '640 FLOP'
    """
    if count is None:
        return "-"
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(count) < 1000 or unit == "P":
            return f"{count:.0f} FLOP" if not unit else f"{count:.2f} {unit}FLOP"
        count /= 1000
    return "-"
