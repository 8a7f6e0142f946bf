"""Budgets as people write them: ``"60 %"``, a fraction, ``"4 GiB"``, ``"3 GFLOP"`` or a number."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from cheapgrad.cost.units import format_bytes, format_flops
from cheapgrad.errors import BudgetError

Budget = str | int | float

_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES |= {"KB": 10**3, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_FLOPS = {
    f"{prefix}{unit}": 10**power
    for prefix, power in (("", 0), ("k", 3), ("M", 6), ("G", 9), ("T", 12), ("P", 15))
    for unit in ("FLOP", "FLOPs")
}
_TEXT = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*(%|[A-Za-z]*)\s*")


@dataclass(frozen=True)
class Limit:
    """A budget that was understood.

    Attributes:
        name: of the argument.
        given: what the user wrote.
        value: in bytes, FLOPs, or as a multiple of the mini-batch variance.
    """

    name: str
    given: Budget
    value: float


def read_memory(given: Budget, exact_bytes: float) -> Limit:
    """Return bytes held for backward.

    Args:
        given: ``"60 %"`` or a fraction in (0, 1] of what the exact step holds, ``"4 GiB"``, or a number of bytes.
        exact_bytes: what the exact step holds.

    Raises:
        BudgetError: if it is none of these.

    >>> read_memory("60 %", 1000).value, read_memory("2 KiB", 1000).value, read_memory(0.25, 1000).value
    (600.0, 2048.0, 250.0)
    """
    return Limit("memory", given, _read("memory", given, exact_bytes, _BYTES, "'60 %', 0.6 or '4 GiB'"))


def read_flops(given: Budget, exact_flops: float) -> Limit:
    """Return FLOPs of the backward pass.

    Args:
        given: ``"60 %"`` or a fraction in (0, 1] of the exact backward pass, ``"3 GFLOP"``, or a number of FLOPs.
        exact_flops: of the exact backward pass.

    Raises:
        BudgetError: if it is none of these.

    >>> read_flops("1.5 MFLOP", 1e9).value, read_flops(0.5, 1e9).value
    (1500000.0, 500000000.0)
    """
    return Limit("flops", given, _read("flops", given, exact_flops, _FLOPS, "'60 %', 0.6 or '3 GFLOP'"))


def read_noise(given: Budget) -> Limit:
    """Return added variance as a multiple of that of the mini-batch gradient.

    Args:
        given: ``"5 %"`` or a number of at least 0.

    Raises:
        BudgetError: if it is neither.

    >>> read_noise("5 %").value, read_noise(0.05).value
    (0.05, 0.05)
    """
    example = "'5 %' or 0.05"
    number, unit = _split("noise", given, example)
    if unit not in ("", "%"):
        raise BudgetError(f"noise has no unit {unit!r} (in {given!r}); give e.g. {example}")
    return Limit("noise", given, number / 100 if unit else number)


def read_limit(name: str, given: Budget, exact_bytes: float, exact_flops: float) -> Limit:
    """Return the limit of any of the three budgets.

    Args:
        name: `memory`, `flops` or `noise`.
        given: what was written.
        exact_bytes: what the exact step holds.
        exact_flops: of the exact backward pass.
    """
    if name == "noise":
        return read_noise(given)
    return read_memory(given, exact_bytes) if name == "memory" else read_flops(given, exact_flops)


def describe_limit(limit: Limit, value: float | None = None) -> str:
    """Return a value in the unit of a limit; that of the limit itself if none is given."""
    value = limit.value if value is None else value
    if limit.name == "noise":
        return f"{value:.3g}"
    return format_bytes(value) if limit.name == "memory" else format_flops(value)


def _read(name: str, given: Budget, exact: float, units: dict[str, int], example: str) -> float:
    number, unit = _split(name, given, example)
    if unit == "%" or (not unit and number <= 1):
        share = number / 100 if unit else number
        if not 0 < share <= 1:
            raise BudgetError(f"{name} as a share must be in (0, 1], but got {given!r}; give e.g. {example}")
        return share * exact
    if unit and unit not in units:
        raise BudgetError(f"{name} has no unit {unit!r} (in {given!r}): it is one of {', '.join(units)}, or %")
    return number * units.get(unit, 1)


def _split(name: str, given: Budget, example: str) -> tuple[float, str]:
    if isinstance(given, str):
        match = _TEXT.fullmatch(given)
        if match is None:
            raise BudgetError(f"cannot read {name}={given!r}; give e.g. {example}")
        return float(match[1]), match[2]
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not math.isfinite(given) or given < 0:
        raise BudgetError(f"{name} must be a text or a number of at least 0, but got {given!r}; give e.g. {example}")
    return float(given), ""
