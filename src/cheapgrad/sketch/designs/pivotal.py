"""Pivotal sampling by a random tournament: fixed size, exact inclusion probabilities, log2(n) vectorised rounds."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from cheapgrad.sketch import random
from cheapgrad.sketch.designs._abstract import AbstractFixedSizeDesign

_LARGEST_ENUMERATED = 6


@dataclass(frozen=True, repr=False)
class Pivotal(AbstractFixedSizeDesign):
    r"""Draw exactly K atoms with exactly the asked inclusion probabilities, by pairwise duels.

    Atoms meet in a random order as in a knock-out tournament. In a duel of probabilities a and b one atom is settled
    (in or out) and the other carries on with what is left: if ``a + b <= 1`` one drops out and the other goes on with
    ``a + b``; otherwise one is taken and the other goes on with ``a + b - 1``. The chances are those that keep both
    expectations.

    **Law** Size K in every draw; inclusion probabilities exact. Pairwise probabilities are exact for equal
    probabilities and, by enumeration, for n <= 6; otherwise the cross terms of the variance are approximated.

    >>> Pivotal().draw(torch.ones(8), 3).index_K.shape
    torch.Size([3])

    References:
        J.-C. Deville and Y. Tille, Unequal probability sampling without replacement through a splitting method,
        Biometrika 85 (1998). Theirs plays the duels one after another, ours as a tournament.
    """

    def draw_randomness(self, probabilities: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return the sort keys of the seeding order ``[..., n]`` and one number per duel ``[..., 2 ** rounds]``."""
        size = probabilities.shape[-1]
        duels = _padded_size(size)
        numbers = random.uniform(probabilities, (*probabilities.shape[:-1], size + duels), generator=generator)
        return numbers[..., :size], numbers[..., size:]

    def select(self, probabilities: Tensor, randomness: tuple[Tensor, ...], count: int) -> Tensor:
        """Return the chosen indices for given sort keys and duel numbers."""
        keys, numbers = randomness
        size = probabilities.shape[-1]
        order = keys.argsort(dim=-1)
        mass = _pad(probabilities.gather(-1, order), _padded_size(size))
        unit = torch.arange(mass.shape[-1], device=mass.device).expand(mass.shape)
        included = torch.zeros_like(mass)
        used = 0
        while mass.shape[-1] > 1:
            pairs = mass.shape[-1] // 2
            uniform = numbers[..., used : used + pairs]
            used += pairs
            settled_unit, settled_value, unit, mass = _duel(mass, unit, uniform)
            included = included.scatter(-1, settled_unit, settled_value)
        included = included.scatter(-1, unit, mass.round())
        position = included.topk(count, dim=-1, sorted=False).indices
        return order.gather(-1, position.clamp(max=size - 1))

    def joint_inclusion(self, probabilities: Tensor) -> Tensor | None:
        """Average the pair products over all orders and all duel outcomes."""
        size = probabilities.shape[-1]
        if size > _LARGEST_ENUMERATED:
            return None
        joint = torch.zeros(size, size, dtype=torch.float64, device=probabilities.device)
        orders = list(itertools.permutations(range(size)))
        for order in orders:
            for chance, included in _outcomes([(float(probabilities[i]), i) for i in order]):
                chosen = torch.tensor(included, device=joint.device)
                joint[chosen.unsqueeze(-1), chosen] += chance
        return (joint / len(orders)).diagonal_scatter(probabilities)


def _padded_size(size: int) -> int:
    return 1 << max(0, (size - 1).bit_length())


def _pad(mass: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(mass, (0, size - mass.shape[-1]))


def _duel(mass: Tensor, unit: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Play all duels of a round; return the settled units, their values, and the survivors with their mass."""
    first, second = mass[..., 0::2], mass[..., 1::2]
    total = first + second
    drops_out = total <= 1
    # Chance that the first atom survives: a / (a + b) when one drops out, (1 - a) / (2 - a - b) when one is taken.
    low_chance = first / torch.where(total > 0, total, 1.0)
    high_chance = (1 - first) / torch.where(total < 2, 2 - total, 1.0)
    first_survives = uniform < torch.where(drops_out, low_chance, high_chance)
    survivor = torch.where(first_survives, unit[..., 0::2], unit[..., 1::2])
    settled = torch.where(first_survives, unit[..., 1::2], unit[..., 0::2])
    return settled, (~drops_out).to(mass.dtype), survivor, torch.where(drops_out, total, total - 1)


def _outcomes(players: list[tuple[float, int]]) -> list[tuple[float, list[int]]]:
    """List every outcome of a small tournament as (chance, included atoms), in plain Python."""
    padded = players + [(0.0, -1)] * (_padded_size(len(players)) - len(players))
    states = [(1.0, padded, [])]
    while len(states[0][1]) > 1:
        states = [grown for state in states for grown in _play_round(*state)]
    return [
        (chance, sorted(included + ([alive[0][1]] if alive[0][0] > 0.5 else []))) for chance, alive, included in states
    ]


def _play_round(
    chance: float, players: list[tuple[float, int]], included: list[int]
) -> list[tuple[float, list[tuple[float, int]], list[int]]]:
    branches = [(chance, [], included)]
    for (a, first), (b, second) in zip(players[0::2], players[1::2], strict=True):
        total = a + b
        taken = total > 1
        survives = (1 - a) / (2 - total) if taken and total < 2 else (a / total if 0 < total <= 1 else float(not taken))
        rest = total - 1 if taken else total
        grown = []
        for weight, alive, chosen in branches:
            for probability, survivor, settled in ((survives, first, second), (1 - survives, second, first)):
                if probability > 0:
                    kept = [*chosen, settled] if taken else chosen
                    grown.append((weight * probability, [*alive, (rest, survivor)], kept))
        branches = grown
    return branches
