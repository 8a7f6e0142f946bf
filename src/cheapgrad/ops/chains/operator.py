"""The operator that row-wise layers are in compiled graphs, whose body runs while the backward pass is traced.

`torch.compile` works in two steps. The first one reads Python and sees no autograd graph, so that no layer can tell
what its input was computed from. The second one runs the operators that were found, with real autograd nodes, and
writes down what forward and backward do. Layers are therefore one operator to the first step, and their Python runs
in the second, where chains are found as in eager mode. What the operator is told has to be plain data: the strategies
and the options of the layer are text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cheapgrad.errors import CheapgradError
from cheapgrad.ops.activation import Activation
from cheapgrad.ops.chains.code_identity import is_ours, name_code
from cheapgrad.ops.plan import Plan, RootUse
from cheapgrad.sketch import AbstractStrategy
from cheapgrad.sketch.value import from_dict

#: Runs a layer: ``(x, parameters, plan, numbers, *options) -> output``.
Body = Callable[..., Tensor]

torch.library.define(
    "cheapgrad::row_wise", "(Tensor x, Tensor?[] parameters, float[] numbers, str layer, str plan) -> Tensor"
)
torch.library.define("cheapgrad::row_wise_", "(Tensor(a!) x, float[] numbers, str layer, str plan) -> Tensor(a!)")


def plan_text(stored: AbstractStrategy | None, cotangent: AbstractStrategy | None, recompute: bool) -> str:
    """Return strategies as text, or an empty one for a user's own.

    Those the compiler reads itself, layer by layer: a graph on disk would not know when their code has changed.

    Args:
        stored: see `Plan`.
        cotangent: see `Plan`.
        recompute: see `Plan`.
    """
    strategies = (stored, cotangent)
    if not all(map(is_ours, strategies)):
        return ""
    try:
        text = json.dumps([*(None if each is None else each.to_dict() for each in strategies), recompute])
        plan = _read_plan(text)
    except (TypeError, ValueError, CheapgradError):
        return ""
    return text if (plan.stored, plan.cotangent) == strategies else ""


def _read_plan(text: str) -> Plan:
    stored, cotangent, recompute = json.loads(text)
    return Plan(
        None if stored is None else from_dict(stored),
        None if cotangent is None else from_dict(cotangent),
        recompute=recompute,
        root_use=RootUse() if recompute else None,
    )


def is_held_back(plan: Plan) -> bool:
    """Tell whether Python is only being read, so that a layer of this plan has to be called by `call`."""
    return bool(plan.text) and torch.compiler.is_dynamo_compiling()


def call(
    x: Tensor, parameters: Sequence[Tensor | None], plan: Plan, *layer: Any, numbers: Sequence[float] = ()
) -> Tensor:
    """Put a layer into the graph, to be run when the graph is traced.

    Args:
        x: the input.
        parameters: what else is read.
        plan: the strategies.
        layer: the name that the layer is registered under, and its options, plain data.
        numbers: options that may be symbols.
    """
    return torch.ops.cheapgrad.row_wise(x, list(parameters), list(numbers), _as_text(layer), plan.text)


def call_in_place(x: Tensor, plan: Plan, *layer: Any, numbers: Sequence[float] = ()) -> Tensor:
    """Put a layer that writes its output over its input into the graph; arguments as for `call`."""
    return torch.ops.cheapgrad.row_wise_(x, list(numbers), _as_text(layer), plan.text)


def _as_text(layer: tuple[Any, ...]) -> str:
    return json.dumps([name_code(), *layer])


# What `torch.compiler.assume_constant_result` does, which would import the compiler with this package.
_as_text._dynamo_marked_constant = True  # type: ignore[attr-defined] - a mark on a function


def define_operator(bodies: dict[str, Body], in_place: Body) -> None:
    """Say what the operator does; to be called once.

    Args:
        bodies: name of a layer -> what runs it.
        in_place: runs an activation that writes over its input: ``(x, plan, activation) -> x``.
    """

    def run(x: Tensor, parameters: list[Tensor | None], numbers: list[float], layer: str, plan: str) -> Tensor:
        _, name, *options = json.loads(layer)
        return bodies[name](x, tuple(parameters), _read_plan(plan), tuple(map(float, numbers)), *options)

    def run_in_place(x: Tensor, numbers: list[float], layer: str, plan: str) -> Tensor:
        return in_place(
            x, _read_plan(plan), Activation.from_options(tuple(map(float, numbers)), *json.loads(layer)[1:])
        )

    torch.library.impl("cheapgrad::row_wise", "CompositeImplicitAutograd")(run)
    torch.library.impl("cheapgrad::row_wise_", "CompositeImplicitAutograd")(run_in_place)
