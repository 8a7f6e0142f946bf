"""Systematic sampling, after a random permutation or in order: fixed size, exact inclusion probabilities."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cheapgrad.errors import PlacementError
from cheapgrad.sketch import random
from cheapgrad.sketch.designs._abstract import AbstractFixedSizeDesign, SquaredNormOfSum
from cheapgrad.sketch.transforms import is_plain
from cheapgrad.sketch.water_filling import water_filling

_LARGEST_ENUMERATED = 8
_LARGEST_INTEGRATED = 256
_QUADRATURE_POINTS = 128


@dataclass(frozen=True, repr=False)
class Systematic(AbstractFixedSizeDesign):
    r"""Draw exactly K atoms with exactly the asked inclusion probabilities.

    The atoms are laid on a line, each with a length equal to its probability; the K points ``u, u + 1, ..., u + K - 1``
    with one uniform u pick the atoms they fall on. With ``permute=True`` the line is shuffled first. With
    ``permute=False`` the atoms stay in order, so that neighbours (tokens of one example) rarely come together: lower
    variance of dW where neighbours resemble each other, and one sort less. If the atoms repeat with a period that the
    points share (equal scores and an even number of tokens, say), the variance can also be higher; never the bias.

    Args:
        permute: shuffle the atoms first.

    **Law** Size K in every draw; inclusion probabilities exact. In order, the variance is the integral over u, exact
    for n <= 256 and by quadrature beyond. Shuffled, pairwise probabilities are exact for equal
    probabilities and, by enumeration, for n <= 8; otherwise the cross terms of the variance are approximated.

    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch...>
    >>> Systematic().draw(torch.tensor([5.0, 1.0, 1.0, 1.0]), 2).index_K.sort().values[0]
    tensor(0)

    References:
        W. G. Madow, On the theory of systematic sampling II, Ann. Math. Stat. 20 (1949).
    """

    permute: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.permute, bool):
            raise PlacementError(f"permute must be True or False, but got {self.permute!r}")

    def draw_randomness(self, probabilities: Tensor, generator: torch.Generator | None) -> tuple[Tensor, ...]:
        """Return the starting point ``[..., 1]``, after the order of the atoms ``[..., n]`` if they are shuffled."""
        start = random.uniform(probabilities, (*probabilities.shape[:-1], 1), generator=generator)
        if not self.permute:
            return (start,)
        return random.permutation(probabilities, probabilities.shape, generator=generator), start

    def select(self, probabilities: Tensor, randomness: tuple[Tensor, ...], count: int) -> Tensor:
        """Return the chosen indices for a given order and starting point."""
        order, start = randomness if self.permute else (None, *randomness)
        # Lengths are added up, and NumPy knows no bfloat16.
        probabilities, start = probabilities.double(), start.double()
        if probabilities.dim() == 1 and is_plain(probabilities) and is_plain(start):
            order = None if order is None else order.numpy()
            return torch.from_numpy(_select_array(probabilities.numpy(), order, float(start), count))
        ends = (probabilities if order is None else probabilities.gather(-1, order)).cumsum(-1)
        ends = ends * (count / ends[..., -1:])
        points = start + torch.arange(count, device=start.device, dtype=start.dtype)
        position = torch.searchsorted(ends, points, right=True).clamp(max=ends.shape[-1] - 1)
        return position if order is None else order.gather(-1, position)

    def variance(
        self, squared_norms: Tensor, scores: Tensor, count: int, squared_norm_of_sum: SquaredNormOfSum
    ) -> Tensor:
        """Horvitz-Thompson variance if permuted; in order, the mean squared error over the starting point."""
        if self.permute:
            return super().variance(squared_norms, scores, count, squared_norm_of_sum)
        probabilities = water_filling(scores, count)
        inverse = torch.where(probabilities > 0, 1.0 / probabilities, 0.0)
        total = squared_norms.new_zeros((), dtype=torch.float64)
        for start, width in zip(*_starting_points(probabilities), strict=True):
            index = self.select(probabilities, (start.view(1),), min(count, probabilities.shape[0]))
            weights = torch.zeros_like(inverse).index_put((index,), inverse[index])
            total = total + width * squared_norm_of_sum(weights - (probabilities > 0).double()).double()
        return total

    def is_approximated(self, probabilities: Tensor) -> bool:
        """Tell whether the variance is approximated: for many atoms in random order; in order it is an integral."""
        return self.permute and self.joint_inclusion(probabilities) is None

    def joint_inclusion(self, probabilities: Tensor) -> Tensor | None:
        """Average, over all orders, the length on the unit circle where two atoms' arcs overlap; None in order."""
        size = probabilities.shape[-1]
        if not self.permute or size > _LARGEST_ENUMERATED:
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


def _select_array(probabilities: np.ndarray, order: np.ndarray | None, start: float, count: int) -> np.ndarray:
    """Do the same for one line of atoms, and return the indices in order: memory is then read in order."""
    if not count:
        return np.zeros(0, dtype=np.int64)
    ends = (probabilities if order is None else probabilities[order]).cumsum()
    ends *= count / ends[-1]
    position = np.minimum(ends.searchsorted(np.arange(count) + start, side="right"), ends.size - 1)
    return position if order is None else np.sort(order[position])


def _starting_points(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Return starting points and weights: one per interval of u without change if they are few, else midpoints."""
    if probabilities.shape[0] > _LARGEST_INTEGRATED:
        steps = torch.arange(_QUADRATURE_POINTS, dtype=torch.float64, device=probabilities.device)
        return (steps + 0.5) / _QUADRATURE_POINTS, torch.full_like(steps, 1.0 / _QUADRATURE_POINTS)
    edges = torch.cat([probabilities.cumsum(0) % 1.0, probabilities.new_tensor([0.0, 1.0])]).sort().values
    return (edges[1:] + edges[:-1]) / 2, edges.diff()


def _arc_overlap(starts: Tensor, lengths: Tensor) -> Tensor:
    """Return the overlap of arcs ``[start, start + length]`` on a circle of circumference 1, pairwise."""
    total = torch.zeros(*starts.shape, starts.shape[-1], dtype=starts.dtype, device=starts.device)
    for shift in (-1.0, 0.0, 1.0):
        low = torch.maximum(starts.unsqueeze(-1), starts.unsqueeze(-2) + shift)
        high = torch.minimum((starts + lengths).unsqueeze(-1), (starts + lengths).unsqueeze(-2) + shift)
        total = total + (high - low).clamp(min=0)
    return total
