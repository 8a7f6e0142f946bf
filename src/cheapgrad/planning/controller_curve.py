"""The variance of a draw as a function of its budget, from its scores alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: Keep fractions at which the variance of a layer's draw is evaluated; in between it is interpolated.
KEEPS = (1, 0.97, 0.93, 0.88, 0.82, 0.75, 0.67, 0.59, 0.5, 0.42, 0.35, 0.29, 0.23, 0.18, 0.13, 0.09, 0.05, 0.03, 0.01)


def draw_curve(scores: Tensor) -> Tensor:
    """Return the least variance of a draw at every fraction of `KEEPS`, and the scores' squared norm.

    That of `cheapgrad.sketch.minimum_variance`, with a budget that need not be a whole number: ``(Σ_tail s)² / (K - m)
    - Σ_tail s²``, where m atoms are certain.
    """
    descending = np.sort(scores.detach().double().cpu().numpy())[::-1]
    squares = descending * descending
    # Sums from the small end, so that a tiny tail is not lost in the rounding of a large total.
    tail_sums = np.append(descending[::-1].cumsum()[::-1], 0.0)
    tail_squares = np.append(squares[::-1].cumsum()[::-1], 0.0)
    counts = np.maximum(np.asarray(KEEPS) * descending.size, 1.0)
    # Atom i is certain from the budget on at which ``(K - i) s_i`` reaches the sum of all that are not larger.
    with np.errstate(divide="ignore", invalid="ignore"):
        needed = np.where(descending > 0, tail_sums[:-1] / descending, np.inf) + np.arange(descending.size)
    certain = np.searchsorted(np.maximum.accumulate(needed), counts, side="left")
    left = np.maximum(counts - certain, 1.0)
    curve = np.maximum(tail_sums[certain] ** 2 / left - tail_squares[certain], 0.0)
    curve[counts >= descending.size] = 0.0
    return torch.from_numpy(np.append(curve, tail_squares[0]))


def relative_variance(curve: Tensor, keep: float) -> float:
    """Return a draw's relative variance at a keep fraction, linear in ``1 / keep`` between those of `KEEPS`.

    Args:
        curve: variances at `KEEPS` and the squared norm they are relative to, shape ``[len(KEEPS) + 1]``.
        keep: in (0, 1].
    """
    *variances, squared_norm = curve.tolist()
    if squared_norm <= 0:
        return 0.0
    last = len(KEEPS) - 1
    upper = next((place for place, known in enumerate(KEEPS) if known <= keep), last)
    lower = max(upper - 1, 0)
    if upper == lower:
        return variances[upper] / squared_norm
    start, end = 1 / KEEPS[lower], 1 / KEEPS[upper]
    share = (1 / max(keep, KEEPS[last]) - start) / (end - start)
    return (variances[lower] + share * (variances[upper] - variances[lower])) / squared_norm
