"""Stochastic rounding by its definition, given the scales of the groups."""

from __future__ import annotations

import numpy as np


def lower_upper_chance(values: np.ndarray, low: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the two grid points around every value and the chance of the upper one."""
    with np.errstate(invalid="ignore", divide="ignore"):
        position = np.where(step > 0, (values - low) / step, 0.0)
    below = np.floor(position)
    return low + below * step, low + (below + 1) * step, position - below


def mirrored_digits(count: int) -> list[float]:
    """Return ``sum_k digit_k 2**(-k - 1)`` over the binary digits of 0, ..., count - 1."""
    return [sum(((index >> place) & 1) * 0.5 ** (place + 1) for place in range(32)) for index in range(count)]


def outcomes_of_a_draw(up: np.ndarray, shift: np.ndarray) -> list[tuple[float, float, np.ndarray]]:
    """Cut [0, 1) where an entry that shares the draw changes its mind; return per piece its middle, length and ups.

    Entry i goes up where ``frac(draw + shift_i) >= 1 - up_i``.
    """
    ends = np.unique(np.concatenate([[0.0, 1.0], (1 - up - shift) % 1, (1 - shift) % 1]))
    return [
        (middle, length, (middle + shift) % 1 >= 1 - up)
        for middle, length in zip((ends[:-1] + ends[1:]) / 2, np.diff(ends), strict=True)
    ]
