"""Refusals: second derivatives and forward mode through a sketched backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cheapgrad.errors import ForwardModeError, SecondDerivativeError

_SECOND_DERIVATIVE = (
    "a second derivative was taken through a sketched {name}: the same random draw would be used twice and the result "
    "would be biased by hundreds of percent; compute it under `with handle.exact():` (or after handle.revert())"
)
_FORWARD_MODE = (
    "forward-mode differentiation was asked of a sketched {name}, which only replaces the reverse pass; run it under "
    "`with handle.exact():` (or after handle.revert())"
)


class _DifferentiateOnce(torch.autograd.Function):
    """The identity, with a backward that raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, name: str, *causes: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[1]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> None:
        raise SecondDerivativeError(_SECOND_DERIVATIVE.format(name=ctx.name))


def differentiate_once(gradient: Tensor | None, name: str, *causes: Tensor | None) -> Tensor | None:
    """Return `gradient`, tied to its causes so that differentiating it again raises `SecondDerivativeError`."""
    if gradient is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradient
    return _DifferentiateOnce.apply(gradient, name, *[cause for cause in causes if cause is not None])


def refuse_forward_mode(name: str) -> None:
    """Raise `ForwardModeError`."""
    raise ForwardModeError(_FORWARD_MODE.format(name=name))
