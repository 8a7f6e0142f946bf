"""Biased references, for comparison in experiments only: what the library refuses to offer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cheapgrad.sketch import AbstractDesign, Selection
from cheapgrad.sketch.designs._abstract import SquaredNormOfSum


@dataclass(frozen=True, repr=False)
class LargestWithoutWeights(AbstractDesign):
    """Keep the atoms with the largest scores, each counted once: biased, because the others are dropped for good.

    References:
        X. Sun et al., "meProp", ICML 2017, in its unified form (the same columns for all rows).
    """

    def draw(self, scores: Tensor, count: int, generator: torch.Generator | None = None) -> Selection:
        """Take the largest; nothing is drawn."""
        size = scores.shape[-1]
        index = scores.topk(min(count, size)).indices
        return Selection(index, torch.ones_like(index, dtype=torch.float64), size)

    def variance(
        self, squared_norms: Tensor, scores: Tensor, count: int, squared_norm_of_sum: SquaredNormOfSum
    ) -> Tensor:
        """Return the squared error, which is all bias: ``||sum of the dropped atoms||**2``."""
        dropped = torch.ones_like(scores, dtype=torch.float64)
        dropped[scores.topk(min(count, scores.shape[-1])).indices] = 0.0
        return squared_norm_of_sum(dropped).double()
