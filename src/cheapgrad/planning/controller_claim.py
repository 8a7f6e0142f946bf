"""Which controller steers a handle: one at a time."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cheapgrad.convert import Handle
from cheapgrad.errors import ControlError, ControlWarning
from cheapgrad.sketch import RowSample


class Claim:
    """A controller's hold on a handle.

    Made while another controller holds the handle, it takes over: strategies are put back as they were converted, and
    the other controller is refused at its next step.

    Args:
        handle: what `cheapgrad.approximate` returned.

    Attributes:
        strategies: what is steered, by layer, as converted.

    Raises:
        ControlError: if `handle` is something else, or no layer samples rows of its cotangent.
    """

    def __init__(self, handle: Any) -> None:
        if not isinstance(handle, Handle):
            raise ControlError(
                f"a controller steers what cheapgrad.approximate(model, rules) returns, but got {type(handle).__name__}"
            )
        other = _claims.get(handle)
        if other is not None:
            handle.replace_strategies(other.strategies)
        self.strategies = {name: value for name, value in handle.strategies().items() if isinstance(value, RowSample)}
        if not self.strategies:
            raise ControlError(
                "no converted layer samples rows of its cotangent, so there is nothing to control; convert with e.g. "
                "cheapgrad.Rule(cotangent=cheapgrad.sketch.RowSample(keep=0.5))"
            )
        _warn_of_batch_norm(handle.model)
        _claims[handle] = self

    def check(self, handle: Handle) -> None:
        """Raise `ControlError` if another controller took over."""
        if _claims.get(handle) is not self:
            raise ControlError(
                "another controller was made for this handle and took over, as two would undo each other's budgets; "
                "call the other one's step(), or make a new one"
            )


_claims: weakref.WeakKeyDictionary[Handle, Claim] = weakref.WeakKeyDictionary()


def _warn_of_batch_norm(model: nn.Module) -> None:
    names = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.training]
    if names:
        warnings.warn(
            f"{names[0]!r}{f' and {len(names) - 1} more' if len(names) > 1 else ''} normalise over the batch, so that "
            "examples see each other: the controller compares halves of a batch and cannot tell their noise apart; "
            "check its noise with cheapgrad.audit, or call eval() on these layers",
            ControlWarning,
            stacklevel=4,
        )
