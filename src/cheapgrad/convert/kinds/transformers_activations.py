"""The activation classes of transformers, recognised by name without importing the library."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from cheapgrad.convert.kinds.layer_kind import LayerKind
from cheapgrad.convert.kinds.row_wise import activation_bytes, activation_shape, row_wise_kind, variance_by
from cheapgrad.ops.activation import Activation
from cheapgrad.ops.chains.activation_stage import ActivationStage
from cheapgrad.ops.chains.joining import stage_in_chain
from cheapgrad.ops.plan import Plan
from cheapgrad.ops.row_laws import slope_law

_TANH = Activation("gelu", (("approximate", "tanh"),))
# Class -> what it computes.
_ACTIVATIONS = {
    "GELUActivation": Activation("gelu"),
    "GELUTanh": _TANH,
    "PytorchGELUTanh": _TANH,
    "NewGELUActivation": Activation("gelu_written_out"),
    "QuickGELUActivation": Activation("quick_gelu"),
    "SiLUActivation": Activation("silu"),
}
# What classes that hold a function hold; some were told to compute it in Python.
_HELD_FUNCTIONS = (functional.gelu, functional.silu)


def _is_named(cls: type[nn.Module], name: str) -> bool:
    return cls.__name__ == name and cls.__module__.startswith("transformers.")


def _run(activation: Activation, module: Any, plan: Plan, x: Tensor) -> Tensor:
    held = getattr(module, "act", None)
    is_known = held is None or held in _HELD_FUNCTIONS or getattr(held, "func", None) in _HELD_FUNCTIONS
    if not is_known:
        return module._cheapgrad.original_class.forward(module, x)
    stage = ActivationStage(activation, plan.stored)
    return stage_in_chain(x, stage, (), plan)


def _kind(name: str, activation: Activation) -> LayerKind:
    kind = row_wise_kind(
        nn.Module,
        functools.partial(_run, activation),
        shape=activation_shape(activation.name),
        saved_bytes=activation_bytes(activation.name),
        variance=variance_by(lambda module, codec: slope_law(activation, codec)),
    )
    return dataclasses.replace(kind, name=name, accepts=functools.partial(_is_named, name=name))


TRANSFORMERS_ACTIVATIONS = tuple(_kind(name, activation) for name, activation in _ACTIVATIONS.items())
