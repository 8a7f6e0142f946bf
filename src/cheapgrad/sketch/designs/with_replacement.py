"""Sampling with replacement (column-row sampling)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cheapgrad.sketch import random
from cheapgrad.sketch.designs._abstract import AbstractDesign, SquaredNormOfSum
from cheapgrad.sketch.selection import Selection
from cheapgrad.sketch.water_filling import prepare_scores


@dataclass(frozen=True, repr=False)
class WithReplacement(AbstractDesign):
    r"""Draw K times, independently, with probabilities ``q_i = s_i / sum s``; weights ``1 / (K q_i)``.

    **Law** Bias 0; variance ``(sum_i ||a_i||**2 / q_i - ||sum_i a_i||**2) / K`` exactly. Not exact at K = n, and never
    better than a fixed-size design on orthogonal atoms: here for comparison.

    >>> WithReplacement().draw(torch.ones(4), 2).weight_K
    tensor([2., 2.], dtype=torch.float64)

    References:
        P. Drineas, R. Kannan and M. Mahoney, Fast Monte Carlo algorithms for matrices I, SIAM J. Comput. 36 (2006).
    """

    def draw(self, scores: Tensor, count: int, generator: torch.Generator | None = None) -> Selection:
        """Draw `count` indices independently."""
        count = min(count, scores.shape[-1])
        chances = draw_chances(scores)
        points = random.uniform(chances, (*chances.shape[:-1], count), generator=generator)
        index = pick_by_chance(chances, points)
        return Selection(index, 1.0 / (count * chances.gather(-1, index)), scores.shape[-1], may_repeat=True)

    def variance(
        self, squared_norms: Tensor, scores: Tensor, count: int, squared_norm_of_sum: SquaredNormOfSum
    ) -> Tensor:
        """Return ``(sum_i ||a_i||**2 / q_i - ||sum_i a_i||**2) / K``."""
        count = min(count, scores.shape[-1])
        chances = draw_chances(scores)
        inverse = torch.where(chances > 0, 1.0 / chances, 0.0)
        total = squared_norm_of_sum(torch.ones_like(chances)).double()
        return ((inverse * squared_norms.double()).sum() - total) / count


def draw_chances(scores: Tensor) -> Tensor:
    """Return scores as probabilities that sum to one; equal ones where every score is zero."""
    scores = prepare_scores(scores)
    total = scores.sum(-1, keepdim=True)
    return torch.where(total > 0, scores / torch.where(total > 0, total, 1.0), 1.0 / scores.shape[-1])


def pick_by_chance(chances: Tensor, points: Tensor) -> Tensor:
    """Return, for points in [0, 1), the atoms whose share of the unit interval they fall on."""
    ends = chances.cumsum(-1)
    ends = ends / ends[..., -1:]
    return torch.searchsorted(ends, points, right=True).clamp(max=ends.shape[-1] - 1)
