"""Systematic sampling after a random permutation: fixed size, exact inclusion probabilities, static shapes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from cheapgrad.sketch import random
from cheapgrad.sketch.designs._abstract import AbstractFixedSizeDesign

_LARGEST_ENUMERATED = 8


@dataclass(frozen=True, repr=False)
class Systematic(AbstractFixedSizeDesign):
    r"""Draw exactly K atoms with exactly the asked inclusion probabilities.

    The atoms are laid on a line in random order, each with a length equal to its probability; the K points
    ``u, u + 1, ..., u + K - 1`` with one uniform u pick the atoms they fall on.

    **Law** Size K in every draw; inclusion probabilities exact. Pairwise probabilities are exact for equal
    probabilities and, by enumeration, for n <= 8; otherwise the cross terms of the variance are approximated.

    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch...>
    >>> Systematic().draw(torch.tensor([5.0, 1.0, 1.0, 1.0]), 2).index_K.sort().values[0]
    tensor(0)

    References:
        W. G. Madow, On the theory of systematic sampling II, Ann. Math. Stat. 20 (1949).
    """

    def draw_randomness(self, probabilities: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return the sort keys of the permutation ``[..., n]`` and the starting point ``[..., 1]``."""
        shape = (*probabilities.shape[:-1], probabilities.shape[-1] + 1)
        numbers = random.uniform(probabilities, shape, generator=generator)
        return numbers[..., :-1], numbers[..., -1:]

    def select(self, probabilities: Tensor, randomness: tuple[Tensor, ...], count: int) -> Tensor:
        """Return the chosen indices for given sort keys and starting point."""
        keys, start = randomness
        order = keys.argsort(dim=-1)
        ends = probabilities.gather(-1, order).cumsum(-1)
        ends = ends * (count / ends[..., -1:])
        points = start + torch.arange(count, device=start.device, dtype=start.dtype)
        position = torch.searchsorted(ends, points, right=True).clamp(max=ends.shape[-1] - 1)
        return order.gather(-1, position)

    def joint_inclusion(self, probabilities: Tensor) -> Tensor | None:
        """Average, over all orders, the length on the unit circle where the arcs of two atoms overlap."""
        size = probabilities.shape[-1]
        if size > _LARGEST_ENUMERATED:
            return None
        orders = torch.tensor(list(itertools.permutations(range(size))), device=probabilities.device)
        lengths = probabilities[orders]
        ends = lengths.cumsum(-1)
        overlap = _arc_overlap((ends - lengths) % 1.0, lengths)
        # Position pairs back to atom pairs, averaged over the orders.
        pairs = (orders.unsqueeze(-1) * size + orders.unsqueeze(-2)).flatten()
        joint = torch.zeros(size * size, dtype=torch.float64, device=probabilities.device)
        joint.index_add_(0, pairs, overlap.flatten())
        joint = (joint / orders.shape[0]).view(size, size)
        return joint.diagonal_scatter(probabilities)


def _arc_overlap(starts: Tensor, lengths: Tensor) -> Tensor:
    """Return the overlap of arcs ``[start, start + length]`` on a circle of circumference 1, pairwise."""
    total = torch.zeros(*starts.shape, starts.shape[-1], dtype=starts.dtype, device=starts.device)
    for shift in (-1.0, 0.0, 1.0):
        low = torch.maximum(starts.unsqueeze(-1), starts.unsqueeze(-2) + shift)
        high = torch.minimum((starts + lengths).unsqueeze(-1), (starts + lengths).unsqueeze(-2) + shift)
        total = total + (high - low).clamp(min=0)
    return total
