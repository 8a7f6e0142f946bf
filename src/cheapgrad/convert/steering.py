"""Who moves the strategies of a conversion, and what they were before; shared by all handles of the conversion."""

from __future__ import annotations

from collections.abc import Mapping

from cheapgrad.convert.handle import Handle
from cheapgrad.sketch import AbstractStrategy


def strategies_as_converted(handle: Handle) -> dict[str, AbstractStrategy]:
    """Return the cotangent's strategies by the layer's name, as they were before anybody steered them.

    Copies and pickles of a model that is steered know them too.
    """
    before = {name: module._cheapgrad.before_steering for name, module in handle._converted()}
    return {name: before[name] or present for name, present in handle.strategies().items()}


def take_over(handle: Handle, strategies: Mapping[str, AbstractStrategy], owner: object) -> None:
    """Let `owner` alone steer a conversion; layers that are steered no more get back what they had before.

    Args:
        handle: any handle of the conversion.
        strategies: of the layers that are steered from now on, as converted.
        owner: who steers.
    """
    layers = {name: module._cheapgrad for name, module in handle._converted()}
    steered = [layers[name] for name in strategies]
    switch = handle._switch
    for conversion in switch.steered:
        if conversion.before_steering is not None and not any(conversion is other for other in steered):
            conversion.replace_cotangent(conversion.before_steering)
            conversion.before_steering = None
    for conversion, strategy in zip(steered, strategies.values(), strict=True):
        conversion.before_steering = strategy
    switch.owner, switch.steered = owner, tuple(steered)


def is_steered_by(handle: Handle, owner: object) -> bool:
    """Tell whether `owner` was the last to take over the conversion."""
    return handle._switch.owner is owner
