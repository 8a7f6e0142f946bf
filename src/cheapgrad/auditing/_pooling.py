"""Draws of several processes as one series."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from cheapgrad.auditing._errors_drawn import DrawnErrors
from cheapgrad.errors import GradientDrawError

_SERIES = ("projections", "along", "squared_errors", "squared_norms", "squared_exact", "inner_products")


@dataclasses.dataclass(frozen=True)
class Pool:
    """The processes whose draws are pooled.

    Attributes:
        group: a process group, or None for this process alone.
    """

    group: Any = None

    @property
    def rank(self) -> int:
        """This process's number, by which its seeds differ from the others'."""
        return 0 if self.group is None else torch.distributed.get_rank(self.group)

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, in order of ranks."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * torch.distributed.get_world_size(self.group)
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the means over processes, tensor by tensor."""
        gathered = self.gather(list(tensors))
        return [torch.stack(values).mean(0) for values in zip(*gathered, strict=True)]


def pool_errors(pool: Pool, errors: DrawnErrors, names: list[str]) -> tuple[DrawnErrors, int]:
    """Return the draws of all processes, and of how many they are.

    Where every process has the same draws, because gradients are averaged before they can be seen (DDP, FSDP), they
    count once. The squared norms of mean errors are then those of this process; else the mean over processes of what
    each found, whose variance part is that of a process's own number of draws.

    Raises:
        GradientDrawError: the processes audit different parameters.
    """
    gathered: list[tuple[list[str], DrawnErrors]] = pool.gather((names, errors))
    if any(other_names != names for other_names, _ in gathered):
        raise GradientDrawError("the processes of the group audit different parameters; give each the same model")
    everyone = [other for _, other in gathered]
    first = everyone[0]
    if all(torch.equal(other.squared_errors, first.squared_errors) for other in everyone):
        synchronised = len(everyone) == 1 or bool(first.varies.any())
        if synchronised:
            return errors, 1
    joined = {name: torch.cat([getattr(other, name) for other in everyone]) for name in _SERIES}
    averaged = {
        name: torch.stack([getattr(other, name) for other in everyone]).mean(0)
        for name in ("squared_mean_errors", "squared_mean_exact", "squared_means")
    }
    return DrawnErrors(
        **joined,
        **averaged,
        varies=torch.stack([other.varies for other in everyone]).any(0),
        wrong=torch.stack([other.wrong for other in everyone]).any(0),
    ), len(everyone)
