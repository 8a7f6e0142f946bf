"""Which operations join the chain of their input, and which start one."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from cheapgrad.ops.chains.activation_stage import ActivationStage
from cheapgrad.ops.chains.chain import Chain, Link, attach_chain, chain_of, held_root, let_rebuild, run_stage, settle
from cheapgrad.ops.chains.functional import recognise_chain
from cheapgrad.ops.chains.gated import recognise_gate
from cheapgrad.ops.chains.linear_stage import LinearStage
from cheapgrad.ops.chains.producers import is_held_by_attention
from cheapgrad.ops.chains.rebuilding import current_scope
from cheapgrad.ops.chains.stage import AbstractStage
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
    if plan.stored is not None and is_held_by_attention(x):
        # A second copy, in codes, would only cost time and noise.
        plan = dataclasses.replace(plan, stored=None)
    chain = chain_of(x) or recognise_chain(x, plan.stored) or recognise_gate(x, plan.stored)
    may_rebuild = plan.recompute and current_scope() is not None
    if chain is not None and _shares_rows(chain, plan):
        weight, bias = cast_for_autocast(weight, bias)
        if not may_rebuild:
            chain = settle(chain)
        output = run_stage(x, LinearStage(plan.stored, is_flat), (weight, bias), plan.cotangent, chain)
        rebuilt = chain_of(output)
        root = held_root(rebuilt) if may_rebuild and rebuilt is not None else None
        if rebuilt is not None and root is not None:
            let_rebuild(output, root, rebuilt.links)
        return output
    if may_rebuild and plan.root_use is not None and plan.root_use.is_kept:
        plan = dataclasses.replace(plan, stored=None)
    output = _start_chain(x, weight, bias, plan, is_flat)
    if may_rebuild and output.numel() >= x.numel():
        # Queries, keys and values of one input need one tensor instead of three.
        root, *parameters = cast_for_autocast(x, weight, bias)
        let_rebuild(output, root, (Link(LinearStage(None, is_flat, plan.root_use), tuple(parameters), ()),))
    return output


def _start_chain(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, is_flat: bool) -> Tensor:
    stage = LinearStage(plan.stored, is_flat)
    if plan.stored is not None:
        x, weight, bias = cast_for_autocast(x, weight, bias)
        return run_stage(x, stage, (weight, bias), plan.cotangent, None)
    output = _linear_alone(x, weight, bias, plan, is_flat)
    if plan.stored is None:
        x, weight, bias = cast_for_autocast(x, weight, bias)
        attach_chain(output, x, stage, (weight, bias), plan.cotangent)
    return output


def _linear_alone(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, is_flat: bool) -> Tensor:
    if not is_flat:
        return sketched_linear(x, weight, bias, plan)
    examples = x.shape[0] if x.dim() > 1 else 1
    rows = sketched_linear(x.reshape(-1, x.shape[-1]), weight, bias, plan, examples=examples)
    return rows.view(*x.shape[:-1], rows.shape[-1])


def _shares_rows(chain: Chain, plan: Plan) -> bool:
    """Tell whether a linear layer may join: all linear layers of a chain draw alike."""
    if not any(link.stage.multiplies for link in chain.links):
        return True
    return chain.cotangent == plan.cotangent


def stage_in_chain(x: Tensor, stage: AbstractStage, parameters: tuple[Tensor | None, ...], stock: Any) -> Tensor:
    """Return the output of a norm or an activation, which joins the chain of its input or starts one.

    Args:
        x: shape ``[..., I]``.
        stage: the operation.
        parameters: its parameters.
        stock: computes the output on its own; used where there is nothing to join and nobody to join it.
    """
    chain = chain_of(x)
    if chain is not None or (stage.stored is not None and stage.rebuilds_output):
        return run_stage(x, stage, parameters, None, chain)
    output = stock()
    if stage.stored is None:
        start = ActivationStage.of_output(stage.activation) if isinstance(stage, ActivationStage) else stage
        attach_chain(output, x, start, parameters, None)
    return output
