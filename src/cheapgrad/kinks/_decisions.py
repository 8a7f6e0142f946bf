"""Deciding kinks by where a direction leads, and by a second direction where the first leads nowhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cheapgrad.errors import UndecidedKinkError
from cheapgrad.kinks.max_pool import first_true


class Decisions:
    """The choices made at the kinks that one run of a program meets, in the order in which it meets them.

    Args:
        earlier: the choices of a run along another direction, which take precedence; None in the first run.

    Attributes:
        decided: kinks at which a side was chosen.
        undecided: kinks that no direction so far leaves to first order.
    """

    def __init__(self, earlier: Decisions | None = None) -> None:
        self._earlier = earlier
        self._made: list[Tensor] = []
        self.decided = 0
        self.undecided = 0

    def choose_side(self, at_kink: Tensor, tangent: Tensor) -> Tensor:
        """Return 1 where the run goes to larger values from here, -1 where to smaller, 0 where neither is known."""
        side = torch.sign(tangent)
        earlier = self._recall(side)
        if earlier is not None:
            side = torch.where(earlier == 0, side, earlier)
        self._made.append(side)
        self._count(at_kink, at_kink & (side == 0))
        return side

    def choose_largest(self, tied: Tensor, tangents: Tensor) -> Tensor:
        """Return the place of the candidate, among those tied on the last axis, that becomes the largest from here."""
        earlier = self._recall(tied)
        left = tied if earlier is None else earlier
        best = tangents.masked_fill(~left, -torch.inf).amax(-1, keepdim=True)
        left = left & (tangents == best)
        self._made.append(left)
        self._count(tied.sum(-1) > 1, left.sum(-1) > 1)
        return first_true(left)

    def _recall(self, like: Tensor) -> Tensor | None:
        """Return the choice made at the same place in the earlier run."""
        if self._earlier is None:
            return None
        place = len(self._made)
        made = self._earlier._made
        if place >= len(made) or made[place].shape != like.shape:
            raise UndecidedKinkError(
                f"two runs of the program differ: at kink call {place + 1} the first run had "
                f"{'none' if place >= len(made) else tuple(made[place].shape)} and the second {tuple(like.shape)}; "
                "let the program do the same whenever it is called"
            )
        return made[place]

    def _count(self, at_kink: Tensor, undecided: Tensor) -> None:
        left = int(undecided.sum())
        self.undecided += left
        self.decided += int(at_kink.sum()) - left


def read_tangent(value: Tensor) -> Tensor:
    """Return the tangent of a dual number, zero for what does not depend on the input."""
    tangent = forward_ad.unpack_dual(value).tangent
    return torch.zeros_like(value) if tangent is None else tangent.detach()


def is_dual(values: Sequence[object]) -> bool:
    """Return whether any of the values is a tensor with a tangent."""
    return any(isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None for value in values)
