"""What is remembered of quantities that drift while a model trains: a mean over looks, and where it is heading."""

from __future__ import annotations

import torch
from torch import Tensor

# Memory in looks: few at first, when everything drifts, then as many as come in this share of the training.
_LEAST_LOOKS, _MOST_LOOKS, _SHARE_OF_STEPS = 6, 24, 1 / 8
# An extrapolated value stays within these factors of the mean.
_LEAST, _MOST = 0.5, 2.0


def count_looks(step: int, gap: int) -> float:
    """Return how many looks, `gap` steps apart, a memory holds at a step of the training.

    >>> count_looks(0, 1), count_looks(96, 1), count_looks(96, 4), count_looks(10_000, 2)
    (6, 12.0, 6, 24)
    """
    return min(max(step * _SHARE_OF_STEPS / gap, _LEAST_LOOKS), _MOST_LOOKS)


def remember(memory: Tensor | None, value: Tensor, looks: float) -> Tensor:
    """Add a look: exponential sums of the values, and of the means after every look, each with its weight.

    Args:
        memory: what this returned last time, shape ``[2, n + 1]``, or None before the first look.
        value: shape ``[n]``.
        looks: how many looks are remembered. Extrapolated, they are as noisy as a plain mean over half as many.
    """
    kept = 1 - 1 / looks
    one = value.new_ones(1)
    memory = value.new_zeros(2, len(value) + 1) if memory is None else kept * memory
    sums = memory[0] + torch.cat([value, one])
    means = memory[1] + torch.cat([sums[:-1] / sums[-1], one])
    return torch.stack([sums, means])


def recall(memory: Tensor) -> Tensor:
    """Return the mean, moved by as much as it lags behind values with a linear trend; Brown's double smoothing."""
    mean, mean_of_means = memory[:, :-1] / memory[:, -1:]
    return (2 * mean - mean_of_means).clamp(_LEAST * mean, _MOST * mean)
