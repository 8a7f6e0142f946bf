"""Stochastic rounding by its definition, given the scales of the groups."""

from __future__ import annotations

import numpy as np


def lower_upper_chance(values: np.ndarray, low: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the two grid points around every value and the chance of the upper one."""
    with np.errstate(invalid="ignore", divide="ignore"):
        position = np.where(step > 0, (values - low) / step, 0.0)
    below = np.floor(position)
    return low + below * step, low + (below + 1) * step, position - below
