"""Pivotal sampling in order: fixed size, exact inclusion probabilities, neighbours rarely together, no resonance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cheapgrad.sketch import random
from cheapgrad.sketch.designs._abstract import AbstractFixedSizeDesign, SquaredNormOfSum
from cheapgrad.sketch.transforms import is_plain
from cheapgrad.sketch.water_filling import water_filling

# Beyond, the law is a mean over this many draws of a generator of its own.
_LARGEST_EXACT = 256
_LAW_DRAWS = 64
_LAW_SEED = 2012


@dataclass(frozen=True, repr=False)
class OrderedPivotal(AbstractFixedSizeDesign):
    r"""Draw exactly K atoms with exactly the asked inclusion probabilities, by duels between neighbours.

    The atoms are laid on a line, each with a length equal to its probability, and the line is cut into K cells of
    length 1. Of the atoms inside a cell, and what came over from the cell before, one is left over, with chances in
    proportion to their lengths in it. It duels with the atom that lies across the cell's end: one of the two is taken,
    the other carries on into the next cell. So there is one atom for each unit of length, as with
    ``Systematic(permute=False)``, and neighbours (tokens of one example) rarely come together: lower variance of dW
    where neighbours resemble each other. But every cell has random numbers of its own: no period of the atoms can fall
    in step with the sample.

    **Law** Size K in every draw; inclusion probabilities exact. Pairwise probabilities are exact for all n; the
    variance is exact for n <= 256. Beyond, it is a mean over 64 draws that are always the same, of a relative standard
    error of about ``sqrt(2 / (64 d))`` where the atoms' sum has d directions of its own: 3 % for d = 40, 18 % for one.

    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch...>
    >>> OrderedPivotal().draw(torch.tensor([5.0, 1.0, 1.0, 1.0]), 2).index_K.sort().values[0]
    tensor(0)

    References:
        J.-C. Deville and Y. Tille, Unequal probability sampling without replacement through a splitting method,
        Biometrika 85 (1998); G. Chauvet, On a characterization of ordered pivotal sampling, Bernoulli 18 (2012), who
        shows that cells may be drawn one by one. Ours draws them all at once: who comes over from the cell before is
        whoever came into the last cell in which the arrival did not win again.
    """

    def draw_randomness(self, probabilities: Tensor, generator: torch.Generator | None) -> tuple[Tensor, ...]:
        """Return a number for each atom: those of the first K cells' contests, then of their duels, are used."""
        shape = (*probabilities.shape[:-1], 2 * probabilities.shape[-1])
        return (random.uniform(probabilities, shape, generator=generator),)

    def select(self, probabilities: Tensor, randomness: tuple[Tensor, ...], count: int) -> Tensor:
        """Return the chosen indices for given numbers."""
        # Lengths are added up, and NumPy knows no bfloat16.
        probabilities, numbers = probabilities.double(), randomness[0].double()
        if probabilities.dim() == 1 and is_plain(probabilities) and is_plain(numbers):
            return torch.from_numpy(_select_array(probabilities.numpy(), numbers.numpy(), count))
        spots, duels = numbers[..., :count], numbers[..., count : 2 * count]
        cells = _cut(probabilities, count)
        # A point of the part that the cell's end does not cut: its atom is left over.
        point = spots * cells.settled
        comes_over = (point < cells.carried) | (cells.first > cells.last)
        inner = torch.searchsorted(cells.ends, cells.number + point, side="right")
        inner = torch.minimum(torch.maximum(inner, cells.first), cells.last).clamp(min=0)
        border_is_taken = (duels < cells.border_chance) | (cells.settled <= 0)
        # Who comes into the next cell; where the arrival won again, whoever came into the last cell without that.
        leaves = torch.where(border_is_taken, inner, cells.border)
        passes = border_is_taken & comes_over
        source = torch.where(passes, 0, cells.number).cummax(-1).values
        arrival = leaves.gather(-1, source)
        arrival = torch.cat([arrival[..., :1], arrival[..., :-1]], -1)
        return torch.where(border_is_taken, cells.border, torch.where(comes_over, arrival, inner))

    def variance(
        self, squared_norms: Tensor, scores: Tensor, count: int, squared_norm_of_sum: SquaredNormOfSum
    ) -> Tensor:
        """Horvitz-Thompson variance for n <= 256; beyond, the mean squared error of draws that are always the same."""
        size = scores.shape[0]
        if size <= _LARGEST_EXACT:
            return super().variance(squared_norms, scores, count, squared_norm_of_sum)
        probabilities = water_filling(scores, count)
        inverse = torch.where(probabilities > 0, 1.0 / probabilities, 0.0)
        generator = torch.Generator(scores.device).manual_seed(_LAW_SEED)
        # Not through the door of randomness, where ranks draw apart: all of them state one law.
        options = {"dtype": torch.float64, "device": scores.device, "generator": generator}
        numbers = torch.rand(_LAW_DRAWS, 2 * size, **options)
        chosen = self.select(probabilities.expand(_LAW_DRAWS, size), (numbers,), min(count, size))
        total = squared_norms.new_zeros((), dtype=torch.float64)
        for index in chosen:
            weights = torch.zeros_like(inverse).index_put((index,), inverse[index])
            total = total + squared_norm_of_sum(weights - (probabilities > 0).double()).double()
        return total / _LAW_DRAWS

    def joint_inclusion(self, probabilities: Tensor) -> Tensor | None:
        """Follow each atom through the cells: taken, out, or carried on."""
        size = probabilities.shape[-1]
        if size > _LARGEST_EXACT:
            return None
        cells = _cut(probabilities, round(float(probabilities.sum())))
        joint = torch.zeros(size, size, dtype=torch.float64, device=probabilities.device)
        taken, carried = torch.zeros_like(joint[0]), torch.zeros_like(joint[0])
        for cell, later in zip(cells.number.tolist(), _chances_of_arrivals(cells), strict=True):
            first, border = int(cells.first[cell]), int(cells.border[cell])
            left_over = 1 / cells.settled[cell] if cells.settled[cell] > 0 else 0.0
            again = float(cells.carried[cell] * left_over)
            inside = slice(first, border)
            wins = probabilities[inside] * left_over
            # With atoms of earlier cells; the arrival and an atom inside exclude each other.
            joint[:first, inside] = taken[:first, None] * probabilities[inside]
            joint[:first, border] = taken[:first] * probabilities[border] + carried[:first] * again * later
            joint[inside, border] = wins * later
            chance = float(cells.border_chance[cell])
            taken[:first] += carried[:first] * again * (1 - chance)
            carried[:first] *= again * chance
            taken[inside], carried[inside] = wins * (1 - chance), wins * chance
            taken[border], carried[border] = chance, 1 - chance
        return (joint + joint.T).diagonal_scatter(probabilities)


@dataclass(frozen=True)
class _Cells:
    """The K cells of length 1, all of shape ``[..., K]`` but the first.

    Attributes:
        ends: of the atoms on the line, ``[..., n]``.
        number: 0, ..., K - 1.
        border: the atom across the cell's end.
        first: the first atom that begins in the cell.
        last: the last one before the border.
        carried: length of the arrival from the cell before.
        settled: length up to the border's beginning.
        border_chance: chance that the border is taken.
    """

    ends: Tensor
    number: Tensor
    border: Tensor
    first: Tensor
    last: Tensor
    carried: Tensor
    settled: Tensor
    border_chance: Tensor


def _cut(probabilities: Tensor, count: int) -> _Cells:
    ends = probabilities.cumsum(-1)
    ends = ends * (ends.new_full((), count) / ends[..., -1:])
    number = torch.arange(count, device=ends.device).expand(*ends.shape[:-1], count).contiguous()
    border = torch.searchsorted(ends, (number + 1).to(ends.dtype))
    # Rounding must not make an atom the border of two cells, nor leave too few for the last ones.
    border = (border - number).cummax(-1).values + number
    border = torch.minimum(border, ends.shape[-1] - count + number)
    before = torch.where(border > 0, ends.gather(-1, (border - 1).clamp(min=0)), 0.0)
    settled = (before - number).clamp(0, 1)
    rest = (ends.gather(-1, border) - (number + 1)).clamp(0, 1)
    carried = torch.nn.functional.pad(rest[..., :-1], (1, 0))
    chance = torch.where(rest < 1, (1 - settled) / torch.where(rest < 1, 1 - rest, 1.0), 0.0)
    first = torch.nn.functional.pad(border[..., :-1] + 1, (1, 0))
    return _Cells(ends, number, border, first, border - 1, carried, settled, chance)


def _select_array(probabilities: np.ndarray, numbers: np.ndarray, count: int) -> np.ndarray:
    """Do what `OrderedPivotal.select` does for one line of atoms, in a quarter of the time."""
    if not count:
        return np.zeros(0, dtype=np.int64)
    number = np.arange(count)
    ends = probabilities.cumsum()
    ends *= count / ends[-1]
    border = np.maximum.accumulate(ends.searchsorted(number + 1.0) - number)
    border = np.minimum(border, ends.size - count) + number
    before = np.where(border > 0, ends[border - 1], 0.0)
    settled = np.minimum(np.maximum(before - number, 0.0), 1.0)
    rest = np.minimum(np.maximum(ends[border] - (number + 1), 0.0), 1.0)
    first, carried = np.zeros(count, dtype=border.dtype), np.zeros(count)
    first[1:], carried[1:] = border[:-1] + 1, rest[:-1]
    stays = 1.0 - rest
    chance = np.divide(1.0 - settled, stays, out=np.zeros(count), where=stays > 0)

    point = numbers[:count] * settled
    comes_over = (point < carried) | (first > border - 1)
    inner = ends.searchsorted(number + point, side="right")
    inner = np.maximum(np.minimum(np.maximum(inner, first), border - 1), 0)
    border_is_taken = (numbers[count : 2 * count] < chance) | (settled <= 0)
    leaves = np.where(border_is_taken, inner, border)
    source = np.maximum.accumulate(np.where(border_is_taken & comes_over, 0, number))
    arrival = np.empty_like(leaves)
    arrival[:1], arrival[1:] = leaves[:1], leaves[source[:-1]]
    return np.where(border_is_taken, border, np.where(comes_over, arrival, inner))


def _chances_of_arrivals(cells: _Cells) -> list[float]:
    """Return the chance that whoever carries on out of each cell is taken in the end."""
    again = torch.where(cells.settled > 0, cells.carried / torch.where(cells.settled > 0, cells.settled, 1.0), 0.0)
    later, chances = 0.0, []
    for won, border in reversed(list(zip(again.tolist(), cells.border_chance.tolist(), strict=True))):
        chances.append(later)
        later = won * (1 - border + border * later)
    return chances[::-1]
