"""Which operations join the chain of their input, and which start one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cheapgrad.ops.activation import Activation
from cheapgrad.ops.activations import may_be_overwritten, overwriting_activation
from cheapgrad.ops.chains.activation_stage import ActivationStage
from cheapgrad.ops.chains.chain import Chain, Link, attach_chain, chain_of, held_root, let_rebuild, run_stage, settle
from cheapgrad.ops.chains.dropout_stage import DropoutStage
from cheapgrad.ops.chains.functional import recognise_chain, recognises_in_place
from cheapgrad.ops.chains.gated import recognise_gate
from cheapgrad.ops.chains.linear_stage import LinearStage, present
from cheapgrad.ops.chains.norm_stage import LayerNormStage
from cheapgrad.ops.chains.operator import call, call_in_place, is_held_back
from cheapgrad.ops.chains.producers import is_held_by_attention
from cheapgrad.ops.chains.rebuilding import current_scope
from cheapgrad.ops.chains.rms_norm_stage import RmsNormStage
from cheapgrad.ops.chains.stage import AbstractStage
from cheapgrad.ops.chains.tagging import Tag, may_tag, tagging
from cheapgrad.ops.linear import cast_for_autocast, sketched_linear
from cheapgrad.ops.plan import Plan
from cheapgrad.sketch import CotangentNorm, StochasticRounding, Uniform
from cheapgrad.sketch._row_sampling import AbstractRowSampling


def is_row_wise(plan: Plan) -> bool:
    """Tell whether a plan's strategies can be shared by the stages of a chain.

    The rows of a chain are drawn at its output, where only the cotangent is known; codes are made row by row.
    """
    draws_rows = isinstance(plan.cotangent, AbstractRowSampling) and isinstance(
        plan.cotangent.scores, (CotangentNorm, Uniform, type(None))
    )
    return (plan.cotangent is None or draws_rows) and isinstance(plan.stored, (StochasticRounding, type(None)))


def linear_in_chain(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, *, is_flat: bool = False) -> Tensor:
    """Return ``x @ weight.T + bias``, its backward pass joined with that of the row-wise operations before it.

    Args:
        x: shape ``[..., I]``.
        weight: shape ``[O, I]``.
        bias: shape ``[O]`` or None.
        plan: the strategies.
        is_flat: whether the stock forward multiplies rows as one matrix.
    """
    if not is_row_wise(plan):
        return _linear_alone(x, weight, bias, plan, is_flat)
    if is_held_back(plan):
        return call(x, (weight, bias), plan, "linear", is_flat)
    is_attended = is_held_by_attention(x)
    if plan.stored is not None and is_attended:
        # A second copy, in codes, would only cost time and noise.
        plan = dataclasses.replace(plan, stored=None)
    chain = chain_of(x) or recognise_chain(x, plan.stored) or recognise_gate(x, plan.stored)
    may_rebuild = plan.recompute and (current_scope() is not None or may_tag())
    if chain is not None and _shares_rows(chain, plan):
        return _join_chain(x, weight, bias, plan, is_flat, chain, may_rebuild)
    may_rebuild = may_rebuild and weight.shape[0] >= weight.shape[1]
    if may_rebuild and plan.root_use is not None and plan.root_use.is_kept:
        plan = dataclasses.replace(plan, stored=None)
    # What attention's own output is projected to is added to something, and nobody keeps it.
    output = _start_chain(
        x, weight, bias, plan, is_flat, Tag() if may_rebuild and may_tag() and not is_attended else None
    )
    if may_rebuild:
        # Queries, keys and values of one input need one tensor instead of three.
        root, *parameters = cast_for_autocast(x, weight, bias)
        let_rebuild(output, root, (Link(LinearStage(None, is_flat, plan.root_use), tuple(parameters), ()),))
    return output


def _join_chain(
    x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, is_flat: bool, chain: Chain, may_rebuild: bool
) -> Tensor:
    weight, bias = cast_for_autocast(weight, bias)
    if not may_rebuild:
        chain = settle(chain)
    may_be_tagged = may_rebuild and may_tag() and held_root(chain) is not None and not _multiplies(chain)
    tag = Tag() if may_be_tagged else None
    output = run_stage(x, LinearStage(plan.stored, is_flat), (weight, bias), plan.cotangent, chain, tag)
    rebuilt = chain_of(output)
    root = held_root(rebuilt) if may_rebuild and rebuilt is not None else None
    if rebuilt is not None and root is not None:
        let_rebuild(output, root, rebuilt.links)
    return output


def _multiplies(chain: Chain) -> bool:
    return any(link.stage.multiplies for link in chain.links)


def _start_chain(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, is_flat: bool, tag: Tag | None) -> Tensor:
    stage = LinearStage(plan.stored, is_flat)
    if plan.stored is not None:
        x, weight, bias = cast_for_autocast(x, weight, bias)
        return run_stage(x, stage, (weight, bias), plan.cotangent, None, tag)
    with tagging(tag):
        output = _linear_alone(x, weight, bias, plan, is_flat)
    x, weight, bias = cast_for_autocast(x, weight, bias)
    attach_chain(output, x, stage, (weight, bias), plan.cotangent, tag)
    return output


def _linear_alone(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, is_flat: bool) -> Tensor:
    if not is_flat:
        return sketched_linear(x, weight, bias, plan)
    examples = x.shape[0] if x.dim() > 1 else 1
    rows = sketched_linear(x.reshape(-1, x.shape[-1]), weight, bias, plan, examples=examples)
    return rows.view(*x.shape[:-1], rows.shape[-1])


def _shares_rows(chain: Chain, plan: Plan) -> bool:
    """Tell whether a linear layer may join: all linear layers of a chain draw alike."""
    return not _multiplies(chain) or chain.cotangent == plan.cotangent


def stage_in_chain(x: Tensor, stage: AbstractStage, parameters: tuple[Tensor | None, ...], plan: Plan) -> Tensor:
    """Return the output of a norm, an activation or a dropout, which joins the chain of its input or starts one.

    Args:
        x: shape ``[..., I]``.
        stage: the operation.
        parameters: its parameters.
        plan: the strategies that the stage was made with.
    """
    if is_held_back(plan):
        return call(x, parameters, plan, *stage.options(), numbers=stage.numbers())
    chain = chain_of(x) or recognise_chain(x, stage.stored)
    if chain is not None or (stage.stored is not None and stage.rebuilds_output):
        return run_stage(x, stage, parameters, None, chain)
    output = stage.alone(x, parameters)
    if stage.stored is None:
        attach_chain(output, x, stage.holding_output(), parameters, None)
    return output


def _run_linear(
    x: Tensor, parameters: tuple[Tensor | None, ...], plan: Plan, numbers: tuple[float, ...], is_flat: bool
) -> Tensor:
    weight, bias = parameters
    return linear_in_chain(x, present(weight), bias, plan, is_flat=is_flat)


def _runs_stage(make: Callable[..., AbstractStage]) -> Callable[..., Tensor]:
    """Return what runs the stage that ``make(plan, features, numbers, *options)`` returns."""

    def run(
        x: Tensor, parameters: tuple[Tensor | None, ...], plan: Plan, numbers: tuple[float, ...], *options: Any
    ) -> Tensor:
        return stage_in_chain(x, make(plan, x.shape[-1], numbers, *options), parameters, plan)

    return run


def overwrite(x: Tensor, plan: Plan, activation: Activation) -> Tensor:
    """Write ``f(x)`` over `x` and return it, as modules with ``inplace=True`` do.

    Args:
        x: the input.
        plan: the strategies.
        activation: f.
    """
    if is_held_back(plan):
        return call_in_place(x, plan, *activation.texts(), numbers=activation.numbers())
    # A chain passes through the stock operation if the next linear layer recognises it.
    is_passed = recognises_in_place(activation) and chain_of(x) is not None
    if plan.stored is None or not x.numel() or is_passed or not may_be_overwritten(x):
        return getattr(torch.nn.functional, activation.name)(x, **dict(activation.options), inplace=True)
    return overwriting_activation(x, activation, plan.stored)


#: What layers are called in compiled graphs, and what runs them there.
LAYERS: dict[str, Callable[..., Tensor]] = {
    "linear": _run_linear,
    "layer_norm": _runs_stage(LayerNormStage.for_plan),
    "rms_norm": _runs_stage(RmsNormStage.for_plan),
    "activation": _runs_stage(ActivationStage.for_plan),
    "dropout": _runs_stage(DropoutStage.for_plan),
}
