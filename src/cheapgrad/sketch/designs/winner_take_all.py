"""Winner-take-all sampling: a deterministic head and a sampled tail."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cheapgrad.sketch import random
from cheapgrad.sketch.designs._abstract import AbstractDesign, SquaredNormOfSum
from cheapgrad.sketch.designs.with_replacement import draw_chances, pick_by_chance
from cheapgrad.sketch.selection import Selection
from cheapgrad.sketch.water_filling import prepare_scores, water_filling


@dataclass(frozen=True, repr=False)
class WinnerTakeAll(AbstractDesign):
    r"""Keep the largest atoms for certain, draw the rest of the budget from the others with replacement.

    The head is water-filling's certain set (the m that minimises ``(sum_tail s)**2 / (K - m) - sum_tail s**2``); each
    of the ``K - m`` tail draws has weight ``1 / ((K - m) q_i)`` with ``q_i = s_i / sum_tail s``.

    **Law** Bias 0; variance ``(sum_tail ||a_i||**2 / q_i - ||sum_tail a_i||**2) / (K - m)`` exactly.

    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch...>
    >>> WinnerTakeAll().draw(torch.tensor([1.0, 9.0, 1.0]), 2).index_K[0]
    tensor(1)

    References:
        Z. Liu et al., Winner-take-all column row sampling, NeurIPS 2023, arXiv:2305.15265. Theirs minimises
        ``(sum_tail s) / (K - m)``; ours the variance, and every branch carries its weight.
    """

    def draw(self, scores: Tensor, count: int, generator: torch.Generator | None = None) -> Selection:
        """Take the head, then draw the tail."""
        size = scores.shape[-1]
        count = min(count, size)
        head, tail_chances = _split(scores, count)
        head_count = head.sum(-1, keepdim=True)
        points = random.uniform(tail_chances, (*tail_chances.shape[:-1], count), generator=generator)
        tail_index = pick_by_chance(tail_chances, points)
        tail_weight = 1.0 / ((count - head_count).clamp(min=1) * tail_chances.gather(-1, tail_index))
        # Static shapes: slot j holds the j-th head atom while j < m, and a tail draw after that.
        head_order = head.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :count]
        in_head = torch.arange(count, device=scores.device) < head_count
        index = torch.where(in_head, head_order, tail_index)
        return Selection(index, torch.where(in_head, 1.0, tail_weight), size, may_repeat=True)

    def variance(
        self, squared_norms: Tensor, scores: Tensor, count: int, squared_norm_of_sum: SquaredNormOfSum
    ) -> Tensor:
        """Return ``(sum_tail ||a_i||**2 / q_i - ||sum_tail a_i||**2) / (K - m)``."""
        head, chances = _split(scores, min(count, scores.shape[-1]))
        left = (min(count, scores.shape[-1]) - head.sum()).clamp(min=1)
        tail = (~head).double()
        inverse = torch.where(chances > 0, 1.0 / chances, 0.0)
        own_terms = (tail * inverse * squared_norms.double()).sum()
        return (own_terms - squared_norm_of_sum(tail).double()) / left


def _split(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the head as a mask and the tail's draw probabilities."""
    head = water_filling(scores, count) >= 1.0
    tail_scores = torch.where(head, 0.0, prepare_scores(scores))
    chances = draw_chances(tail_scores)
    # With a tail of zero scores the even split must stay off the head.
    outside = torch.where(head, 0.0, 1.0)
    even = outside / outside.sum(-1, keepdim=True).clamp(min=1)
    return head, torch.where(tail_scores.sum(-1, keepdim=True) > 0, chances, even)
