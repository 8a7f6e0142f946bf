"""What is remembered of quantities that drift while a model trains: a mean over looks, and where it is heading."""

from __future__ import annotations

import torch
from torch import Tensor

# Memory in looks. Extrapolated, it is as noisy as a plain mean of half the memory, and does not lag behind a trend.
_LOOKS = 8
# An extrapolated value stays within these factors of the mean.
_LEAST, _MOST = 0.5, 2.0


def remember(memory: Tensor | None, value: Tensor) -> Tensor:
    """Add a look: exponential sums of the values, and of the means after every look, each with its weight.

    Args:
        memory: what this returned last time, shape ``[2, n + 1]``, or None before the first look.
        value: shape ``[n]``.
    """
    kept = 1 - 1 / _LOOKS
    one = value.new_ones(1)
    memory = value.new_zeros(2, len(value) + 1) if memory is None else kept * memory
    sums = memory[0] + torch.cat([value, one])
    means = memory[1] + torch.cat([sums[:-1] / sums[-1], one])
    return torch.stack([sums, means])


def recall(memory: Tensor) -> Tensor:
    """Return the mean, moved by as much as it lags behind values with a linear trend; Brown's double smoothing."""
    mean, mean_of_means = memory[:, :-1] / memory[:, -1:]
    return (2 * mean - mean_of_means).clamp(_LEAST * mean, _MOST * mean)
