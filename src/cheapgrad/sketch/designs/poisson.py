"""Poisson sampling: every atom on its own coin; random size, independent inclusions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cheapgrad.sketch import random
from cheapgrad.sketch.designs._abstract import AbstractDesign, SquaredNormOfSum
from cheapgrad.sketch.selection import Selection
from cheapgrad.sketch.transforms import is_transformed
from cheapgrad.sketch.water_filling import water_filling


@dataclass(frozen=True, repr=False)
class Poisson(AbstractDesign):
    r"""Keep each atom independently with its water-filling probability (Bernoulli sampling).

    **Law** Bias 0; variance ``sum_i (1 / p_i - 1) ||a_i||**2`` exactly; the size is random with mean K. Where shapes
    must be static (compiled graphs, vmap, several draws at once) all atoms are kept with weight 0 or 1 / p: same
    estimate, no saving.

    >>> Poisson().draw(torch.ones(4), 4).index_K
    tensor([0, 1, 2, 3])

    References:
        J. Hajek, Asymptotic theory of rejective sampling, Ann. Math. Stat. 35 (1964).
    """

    def draw(self, scores: Tensor, count: int, generator: torch.Generator | None = None) -> Selection:
        """Flip one coin per atom."""
        probabilities = water_filling(scores, count)
        kept = random.uniform(probabilities, probabilities.shape, generator=generator) < probabilities
        weight = torch.where(probabilities > 0, 1.0 / probabilities, 0.0)
        size = probabilities.shape[-1]
        if probabilities.dim() == 1 and not torch.compiler.is_compiling() and not is_transformed(kept):
            index = kept.nonzero().squeeze(-1)
            return Selection(index, weight[index], size)
        index = torch.arange(size, device=scores.device).expand(probabilities.shape)
        return Selection(index, weight * kept, size)

    def variance(
        self, squared_norms: Tensor, scores: Tensor, count: int, squared_norm_of_sum: SquaredNormOfSum
    ) -> Tensor:
        """Return ``sum_i (1 / p_i - 1) ||a_i||**2``."""
        probabilities = water_filling(scores, count)
        inverse = torch.where(probabilities > 0, 1.0 / probabilities, 1.0)
        return ((inverse - 1) * squared_norms.double()).sum()
