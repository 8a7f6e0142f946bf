"""Kinks of the functions that act entry by entry: where they lie, and the slopes on either side."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Number = float | Tensor

_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946


class Breakpoint(NamedTuple):
    """One kink of a function of one variable.

    Attributes:
        at: where it lies.
        left: the derivative just below.
        right: the derivative just above.
    """

    at: Number
    left: Number
    right: Number


def _relu(inplace: bool = False) -> list[Breakpoint]:
    return [Breakpoint(0.0, 0.0, 1.0)]


def _relu6(inplace: bool = False) -> list[Breakpoint]:
    return _hardtanh(0.0, 6.0)


def _hardtanh(min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> list[Breakpoint]:
    return _clamp(min_val, max_val)


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> list[Breakpoint]:
    return [Breakpoint(0.0, negative_slope, 1.0)]


def _abs() -> list[Breakpoint]:
    return [Breakpoint(0.0, -1.0, 1.0)]


def _hardswish(inplace: bool = False) -> list[Breakpoint]:
    return [Breakpoint(-3.0, 0.0, -0.5), Breakpoint(3.0, 1.5, 1.0)]


def _hardsigmoid(inplace: bool = False) -> list[Breakpoint]:
    return [Breakpoint(-3.0, 0.0, 1 / 6), Breakpoint(3.0, 1 / 6, 0.0)]


def _elu(alpha: float = 1.0, inplace: bool = False) -> list[Breakpoint]:
    return [Breakpoint(0.0, alpha, 1.0)]


def _selu(inplace: bool = False) -> list[Breakpoint]:
    return [Breakpoint(0.0, _SELU_SCALE * _SELU_ALPHA, _SELU_SCALE)]


def _softshrink(lambd: float = 0.5) -> list[Breakpoint]:
    if lambd == 0:
        # The identity, though torch has no slope of 1 at 0.
        return [Breakpoint(0.0, 1.0, 1.0)]
    return [Breakpoint(-lambd, 1.0, 0.0), Breakpoint(lambd, 0.0, 1.0)]


def _clamp(min: float | None = None, max: float | None = None) -> list[Breakpoint]:
    if min is not None and max is not None and min >= max:
        # A constant, though torch has a slope of 1 where both bounds meet.
        return [Breakpoint(max, 0.0, 0.0)]
    lower = [] if min is None else [Breakpoint(min, 0.0, 1.0)]
    return lower if max is None else [*lower, Breakpoint(max, 1.0, 0.0)]


def _clamp_min(min: float) -> list[Breakpoint]:
    return _clamp(min=min)


def _clamp_max(max: float) -> list[Breakpoint]:
    return _clamp(max=max)


# By the name of the function; each takes what follows the input in a call of it.
BREAKPOINTS: dict[str, Callable[..., list[Breakpoint]]] = {
    "relu": _relu,
    "relu6": _relu6,
    "hardtanh": _hardtanh,
    "leaky_relu": _leaky_relu,
    "abs": _abs,
    "absolute": _abs,
    "hardswish": _hardswish,
    "hardsigmoid": _hardsigmoid,
    "elu": _elu,
    "selu": _selu,
    "softshrink": _softshrink,
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": _clamp_min,
    "clamp_max": _clamp_max,
}
