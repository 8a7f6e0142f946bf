"""The hooks by which a model's forward pass runs inside a scope that lets saved outputs be computed again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cheapgrad.convert.sketched_layer import Switch
from cheapgrad.ops.chains.rebuilding import RebuildScope, may_rebuild

_SCOPES = "_cheapgrad_scopes"


class _Entering:
    """Enters a scope before a forward pass; an object and not a closure, so that models can be copied and pickled."""

    def __init__(self, switch: Switch) -> None:
        self._switch = switch

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        draws = module.training and not self._switch.exact_depth and may_rebuild()
        scope = RebuildScope() if draws else None
        module.__dict__.setdefault(_SCOPES, []).append(scope)
        if scope is not None:
            scope.enter()


class _Leaving:
    """Leaves the scope, also when the forward pass raised."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        scopes = module.__dict__.get(_SCOPES)
        scope = scopes.pop() if scopes else None
        if scope is not None:
            scope.leave()


def open_scopes(model: nn.Module, switch: Switch) -> None:
    """Let every forward pass of `model` in training run inside a scope of its own."""
    model.register_forward_pre_hook(_Entering(switch))
    model.register_forward_hook(_Leaving(), always_call=True)


def close_scopes(model: nn.Module) -> None:
    """Remove the hooks of `open_scopes`."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, (_Entering, _Leaving))]:
            del hooks[key]
    for key in [key for key in model._forward_hooks_always_called if key not in model._forward_hooks]:
        del model._forward_hooks_always_called[key]
    model.__dict__.pop(_SCOPES, None)
