"""Axes: where a number lies on the paper, and which numbers are written beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_MOST_TICKS = 6
# Numbers beyond, and spans below, are left to the ends of the axis: differences of them are no floats any more.
_LARGEST, _SMALLEST = 1e300, 1e-290


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis.

    Attributes:
        low: number at its beginning.
        high: number at its end, more than `low`.
        start: where it begins, in units of the chart.
        end: where it ends.
        logarithmic: whether equal distances are equal ratios.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Return where a number lies; what lies beyond an end, or is no number, is put on that end or the beginning."""
        if math.isnan(value):
            return self.start
        value = min(max(value, self.low), self.high)
        if self.logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def holds(self, value: float) -> bool:
        """Return whether a number lies between both ends."""
        return self.low <= value <= self.high

    def ticks(self) -> list[float]:
        """Return round numbers between both ends, at most seven."""
        if not self.logarithmic:
            return _round_numbers(self.low, self.high)
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        stride = max(1, math.ceil((last - first + 1) / _MOST_TICKS))
        return [10.0**exponent for exponent in range(first, last + 1, stride)]


def make_linear_axis(values: Iterable[float], start: float, end: float, *, from_zero: bool) -> Axis:
    """Return an axis that all finite numbers lie on, with some room beyond them.

    Args:
        values: what is drawn; infinite and undefined ones do not count.
        start: where it begins.
        end: where it ends.
        from_zero: whether it begins at zero.
    """
    finite = [value for value in values if abs(value) < _LARGEST]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if from_zero:
        low = min(low, 0.0)
    span = next(span for span in (high - low, abs(high), 1.0) if span > _SMALLEST)
    return Axis(low if from_zero and low == 0 else low - 0.08 * span, high + 0.08 * span, start, end)


def make_logarithmic_axis(values: Iterable[float], start: float, end: float) -> Axis:
    """Return a logarithmic axis from one power of ten to another, on which all finite positive numbers lie."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    low, high = (min(positive), max(positive)) if positive else (0.1, 1.0)
    # 300 powers of ten on either side: beyond them floats have no numbers.
    first = max(math.floor(math.log10(low)), -300)
    last = min(max(math.ceil(math.log10(high)), first + 1), 300)
    return Axis(10.0**first, 10.0**last, start, end, logarithmic=True)


def _round_numbers(low: float, high: float) -> list[float]:
    rough = (high - low) / _MOST_TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(position * step, 12) + 0.0 for position in range(first, math.floor(high / step + 1e-9) + 1)]
