"""Which controller steers a conversion: one at a time, whatever handle it was made for."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cheapgrad.convert import Handle
from cheapgrad.convert.steering import is_steered_by, strategies_as_converted, take_over
from cheapgrad.errors import ControlError, ControlWarning
from cheapgrad.sketch import LayerShape, RowSample


class Claim:
    """A controller's hold on a conversion; it changes nothing before `take`.

    Args:
        handle: what `cheapgrad.approximate` or `cheapgrad.get_handle` returned.

    Attributes:
        strategies: what is to be steered, by layer, as converted.

    Raises:
        ControlError: if `handle` is something else, or no layer samples rows of its cotangent.
        ConversionError: if the handle was reverted.
    """

    def __init__(self, handle: Any) -> None:
        if not isinstance(handle, Handle):
            raise ControlError(
                f"a controller steers what cheapgrad.approximate(model, rules) returns, but got {type(handle).__name__}"
            )
        # Raises for a reverted handle, in its own words.
        handle.seen_sizes()
        self._handle = handle
        found = strategies_as_converted(handle)
        self.strategies = {name: value for name, value in found.items() if isinstance(value, RowSample)}
        if not self.strategies:
            raise ControlError(
                "no converted layer samples rows of its cotangent, so there is nothing to control; convert with e.g. "
                "cheapgrad.Rule(cotangent=cheapgrad.sketch.RowSample(keep=0.5))"
            )
        _warn_of_batch_norm(handle.model)
        _warn_of_tokens_first(handle.model)

    def layers(self) -> list[tuple[str, nn.Module]]:
        """Return what is to be steered, by name."""
        return [(name, module) for name, module in self._handle._converted() if name in self.strategies]

    def take(self) -> None:
        """Take over: layers that only another controller steered are as converted, and that controller is refused."""
        take_over(self._handle, self.strategies, self)

    def seen_sizes(self) -> dict[str, Any]:
        """Return the sizes of the steered layers' last training pass, by the layer's name; None before one.

        Raises:
            ControlError: if another controller took over, or a layer is gone.
            ConversionError: if the handle was reverted.
        """
        if not is_steered_by(self._handle, self):
            raise ControlError(
                "another controller was made for this handle, or for another one of the same model, and took over, as "
                "two would undo each other's budgets; call the other one's step(), or make a new one"
            )
        sizes = self._handle.seen_sizes()
        gone = [name for name in self.strategies if name not in sizes]
        if gone:
            raise ControlError(
                f"{_enumerate(gone)} under control {'is' if len(gone) == 1 else 'are'} gone: replaced, removed or "
                "renamed since this controller was made; make a new controller for the layers that are left, or "
                "convert again with cheapgrad.approximate and make one for the new handle"
            )
        return {name: sizes[name] for name in self.strategies}

    def count_examples(self) -> int | None:
        """Return B of the last forward pass: the fewest blocks that any steered layer's rows form; None if unknown."""
        sizes = self._handle.seen_sizes()
        # Not those of layers that are gone: a backward pass goes on, and the step after it says so.
        seen = [sizes.get(name) for name in self.strategies]
        shapes = [shape for each in seen for shape in (each if isinstance(each, tuple) else (each,))]
        return min((shape.examples for shape in shapes if isinstance(shape, LayerShape)), default=None)


def _warn_of_batch_norm(model: nn.Module) -> None:
    names = [name for name, module in model.named_modules() if _sees_batch(module)]
    if names:
        is_one = len(names) == 1
        warnings.warn(
            f"{_enumerate(names)} {'normalises' if is_one else 'normalise'} over the batch, so that examples see each "
            "other: the controller compares halves of a batch and cannot tell their noise apart; check its noise with "
            f"cheapgrad.audit, or let {'it' if is_one else 'them'} normalise by running statistics, with eval() and "
            "track_running_stats=True",
            ControlWarning,
            stacklevel=4,
        )


def _warn_of_tokens_first(model: nn.Module) -> None:
    attentions = [each for each in model.named_modules() if isinstance(each[1], nn.MultiheadAttention)]
    names = [name for name, module in attentions if not module.batch_first]
    if names:
        warnings.warn(
            f"{_enumerate(names)} {'has' if len(names) == 1 else 'have'} the batch on the second axis "
            "(batch_first=False), and the controller takes the first axis for the examples: it would compare tokens, "
            "and its noise would be wrong; build with batch_first=True",
            ControlWarning,
            stacklevel=4,
        )


def _sees_batch(module: nn.Module) -> bool:
    """Tell whether a module normalises over the batch; in eval() too, where there are no running statistics."""
    if not isinstance(module, _BatchNorm):
        return False
    return module.training or (module.running_mean is None and module.running_var is None)


def _enumerate(names: list[str]) -> str:
    if len(names) == 1:
        return f"layer {names[0]!r}"
    *first, last = [*map(repr, names[:3]), f"{len(names) - 3} more"] if len(names) > 3 else map(repr, names)
    return f"layers {', '.join(first)} and {last}"
