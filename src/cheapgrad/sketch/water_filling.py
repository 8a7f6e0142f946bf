"""Water-filling: the inclusion probabilities of least variance under an expected-size budget."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from cheapgrad.errors import check_count
from cheapgrad.sketch.transforms import is_plain

# Stands in for a NaN or infinite score, relative to the largest finite one: such atoms must be kept, never hidden.
_NON_FINITE_SCORE = 1e30
# Below it, the inverse of a sum of scores may be infinite, and they are scaled first.
_SMALLEST_TOTAL = 1e-290


def prepare_scores(scores: Tensor) -> Tensor:
    """Return `scores` in float64, scaled to a largest finite value of 1, with non-finite ones made dominant."""
    scores = scores.double()
    finite = torch.isfinite(scores)
    largest = torch.where(finite, scores, 0.0).amax(-1, keepdim=True)
    scaled = scores / torch.where(largest > 0, largest, 1.0)
    return torch.where(finite, scaled, _NON_FINITE_SCORE)


def _certain_count_and_tail(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return how many top scores are certain, and the sum of the others (both keep the last axis, size 1)."""
    descending = scores.sort(dim=-1, descending=True).values
    # Sums from the small end, so that a tiny tail is not lost in the rounding of a large total.
    tail_sums = descending.flip(-1).cumsum(-1).flip(-1)
    remaining = count - torch.arange(scores.shape[-1], device=scores.device, dtype=scores.dtype)
    certain = (remaining * descending > tail_sums).sum(-1, keepdim=True)
    return certain, tail_sums.gather(-1, certain)


def water_filling(scores: Tensor, count: int) -> Tensor:
    r"""Return the inclusion probabilities of least variance under an expected-size budget.

    Solves ``min sum_i (1 / p_i - 1) s_i**2`` subject to ``sum_i p_i = count`` and ``0 < p_i <= 1``. The solution is
    ``p_i = min(1, lambda s_i)``: the m largest scores are certain, the others share ``count - m`` in proportion to
    their score, and the minimum is ``(sum_tail s)**2 / (count - m) - sum_tail s**2``.

    Atoms of score zero get probability zero unless fewer than `count` scores are positive; the probability left over is
    then shared equally among them, so that the probabilities always sum to `count`.

    Args:
        scores: non-negative scores, shape ``[..., n]``; NaN and infinity count as dominant.
        count: expected number of atoms to keep, at least 1.

    Returns:
        float64 probabilities of shape ``[..., n]`` that sum to ``min(count, n)``.

    Raises:
        BudgetError: if `count` is less than 1.

    >>> water_filling(torch.tensor([4.0, 1.0, 1.0, 0.0]), 2)
    tensor([1.0000, 0.5000, 0.5000, 0.0000], dtype=torch.float64)

    References:
        Optimal unbiased sparsification under an expected budget; the same problem is solved in variance-controlled
        adaptive sampling (arXiv:2402.17227). Ours keeps the sum exact when scores vanish.
    """
    check_count("count", count)
    if is_plain(scores) and scores.dim() == 1:
        return torch.from_numpy(_fill_array(scores.double().numpy(), count))
    scores = prepare_scores(scores)
    if count >= scores.shape[-1]:
        return torch.ones_like(scores)
    certain, tail = _certain_count_and_tail(scores, count)
    # Nothing left in the tail: what remains of the budget goes to the atoms of score zero, in equal parts.
    zeros = (scores == 0).sum(-1, keepdim=True)
    equal_share = torch.where(scores > 0, 1.0, (count - certain).double() / zeros.clamp(min=1))
    # The share first: the inverse of a denormal tail would be infinite.
    proportional = scores / torch.where(tail > 0, tail, 1.0) * (count - certain)
    return torch.where(tail > 0, proportional, equal_share).clamp(max=1.0)


def _fill_array(scores: np.ndarray, count: int) -> np.ndarray:
    """Do the same for one line of scores in float64, in few calls: a layer waits for each."""
    total = float(np.add.reduce(scores))
    if _SMALLEST_TOTAL < total < math.inf and count * float(np.maximum.reduce(scores)) <= total:
        # No atom is certain, and there is nothing to sort.
        return scores * (count / total)
    scores = prepare_scores(torch.from_numpy(scores)).numpy()
    if count >= scores.size:
        return np.ones_like(scores)
    ascending = np.sort(scores)
    tail_sums = ascending.cumsum()
    remaining = np.arange(count + 1 - scores.size, count + 1)
    certain = np.count_nonzero(remaining * ascending > tail_sums)
    tail = tail_sums[-1 - certain]
    if tail > 0:
        with np.errstate(over="ignore"):
            return np.minimum(scores / tail * (count - certain), 1.0)
    equal_share = (count - certain) / max(np.count_nonzero(scores == 0), 1)
    return np.where(scores > 0, 1.0, min(equal_share, 1.0))


def minimum_variance(scores: Tensor, count: int) -> Tensor:
    """Return the optimum ``(sum_tail s)**2 / (count - m) - sum_tail s**2`` that `water_filling` attains.

    >>> minimum_variance(torch.tensor([4.0, 1.0, 1.0, 0.0], dtype=torch.float64), 2)
    tensor(2., dtype=torch.float64)
    """
    if count >= scores.shape[-1]:
        return scores.new_zeros(scores.shape[:-1], dtype=torch.float64)
    scores = scores.double()
    certain, tail = _certain_count_and_tail(scores, count)
    squares = scores.sort(dim=-1, descending=True).values ** 2
    tail_squares = squares.flip(-1).cumsum(-1).flip(-1).gather(-1, certain)
    return (tail**2 / (count - certain).clamp(min=1) - tail_squares).squeeze(-1)
