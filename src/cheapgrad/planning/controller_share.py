"""What a trial showed, added up over the ranks whose gradients are averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from cheapgrad.planning.controller_curve import KEEPS
from cheapgrad.planning.controller_trial import Trial


@dataclass(frozen=True)
class Shared:
    """What all ranks know.

    Attributes:
        totals: as in `Trial`, summed.
        curves: the same.
        layers: the same.
        followers: of any rank.
        seen: of any rank.
        rows: how many rows each layer has, the mean over the ranks that ran it, so that all round alike.
    """

    totals: Tensor
    curves: dict[str, Tensor]
    layers: dict[str, Tensor]
    followers: frozenset[str]
    seen: frozenset[str]
    rows: dict[str, int]


def has_ranks() -> bool:
    """Tell whether there is a process group."""
    return distributed.is_available() and distributed.is_initialized()


def share_trial(
    trial: Trial, rows: Mapping[str, int], names: Sequence[str], device: torch.device, group: Any
) -> Shared:
    """Return a trial's sums over all ranks, by one all-reduce; without a process group, the trial's own.

    Args:
        trial: what this rank measured.
        rows: of the layers that this rank ran.
        names: of all layers, in the same order on every rank.
        device: on which the ranks speak to each other.
        group: whose ranks share; None for the default group.
    """
    if not has_ranks():
        return Shared(
            trial.totals, trial.curves, trial.layers, frozenset(trial.followers), frozenset(trial.seen), dict(rows)
        )
    own_rows = {name: torch.tensor([rows[name], 1.0], dtype=torch.float64) for name in names if name in rows}
    flags = [trial.followers, trial.seen]
    parts = [trial.totals]
    parts += [torch.tensor([float(name in flag) for name in names], dtype=torch.float64) for flag in flags]
    for found, size in ((trial.curves, len(KEEPS) + 1), (trial.layers, 3), (own_rows, 2)):
        parts += [found.get(name, torch.zeros(size, dtype=torch.float64)) for name in names]
    packed = torch.cat(parts).to(device)
    distributed.all_reduce(packed, group=group)
    totals, followers, seen, *rest = packed.cpu().split([len(part) for part in parts])
    count = len(names)
    curves, layers, pairs = (dict(zip(names, rest[start * count :], strict=False)) for start in range(3))
    drawn = [name for name in names if curves[name][-1] > 0]
    return Shared(
        totals,
        {name: curves[name] for name in drawn},
        {name: layers[name] for name in drawn},
        frozenset(name for name, ranks in zip(names, followers.tolist(), strict=True) if ranks),
        frozenset(name for name, ranks in zip(names, seen.tolist(), strict=True) if ranks),
        {name: round(float(pair[0] / pair[1])) for name, pair in pairs.items() if pair[1] > 0},
    )
