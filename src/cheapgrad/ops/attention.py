"""Attention with many heads, as `nn.MultiheadAttention` computes it, with sketched projections.

Queries, keys and values go through a softmax, which is not linear: rounding them would be a bias. They stay exact, and
so does everything between the projections.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cheapgrad.ops.chains.chain import Link, chain_of, held_root, let_rebuild, run_stage, settle
from cheapgrad.ops.chains.joining import is_row_wise
from cheapgrad.ops.chains.linear_stage import present
from cheapgrad.ops.chains.operator import call, is_held_back
from cheapgrad.ops.chains.producers import is_held_by_attention
from cheapgrad.ops.chains.projection_stage import ProjectionStage, unpack
from cheapgrad.ops.chains.rebuilding import current_scope
from cheapgrad.ops.chains.tagging import Tag, may_tag
from cheapgrad.ops.linear import cast_for_autocast, sketched_linear
from cheapgrad.ops.plan import Plan


@dataclass(frozen=True)
class AttentionWeights:
    """The parameters.

    Attributes:
        packed: weights of the three projections below each other ``[3 E, E]``, or None where they are apart.
        apart: the three weights, ``[E, E]``, ``[E, key features]`` and ``[E, value features]``, or None.
        bias: their biases ``[3 E]``, or None.
        out_weight: of the output's projection ``[E, E]``.
        out_bias: ``[E]``, or None.
    """

    packed: Tensor | None
    apart: tuple[Tensor, Tensor, Tensor] | None
    bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None


@dataclass(frozen=True)
class AttentionOptions:
    """What `nn.MultiheadAttention` is told.

    Attributes:
        heads: how many.
        dropout: probability of a zero among the attention's weights.
        batch_first: whether inputs are ``[B, T, E]`` and not ``[T, B, E]``.
        need_weights: whether the attention's weights are returned, which takes the long way to the output.
        average_weights: whether they are averaged over heads.
        is_causal: a promise that the mask is the causal one.
    """

    heads: int
    dropout: float = 0.0
    batch_first: bool = False
    need_weights: bool = True
    average_weights: bool = True
    is_causal: bool = False


def multihead_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: AttentionWeights,
    options: AttentionOptions,
    plan: Plan,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return output and weights of an attention bit for bit as PyTorch does, its projections' backward sketched.

    Args:
        query: shape ``[B, T, E]``, or ``[T, B, E]`` where the batch does not come first.
        key: shape ``[B, S, ...]``, in the same order; the same tensor as `query` for self-attention.
        value: shape ``[B, S, ...]``, in the same order.
        weights: the parameters.
        options: see there.
        plan: the strategies of all projections.
        attn_mask: ``[T, S]`` or ``[B * heads, T, S]``, boolean (true: not allowed) or added to the scores.
        key_padding_mask: ``[B, S]``, likewise.

    Returns:
        The output, in the order of `query`; and the weights, ``[B, T, S]`` or ``[B, heads, T, S]``, or None.

    **Law** Queries, keys, values and the softmax between them exact. The projections are unbiased, with the law of a
    linear layer each; the packed ones share one draw and one code.
    """
    mask = _merge_masks(query, attn_mask, key_padding_mask, options)
    parts = _project_inputs(query, key, value, weights, options, plan)
    q, k, v = (_split_heads(part, options.heads) for part in parts)
    if options.need_weights:
        output, attention = _attend_step_by_step(q, k, v, mask, options)
    else:
        # A mask that was dropped in favour of the promise that it is the causal one.
        is_causal = options.is_causal and key_padding_mask is None
        output = functional.scaled_dot_product_attention(q, k, v, mask, options.dropout, is_causal)
        attention = None
    # A view where the fused attention lays the heads of a token side by side.
    first, second = (0, 2) if options.batch_first else (2, 0)
    merged = output.permute(first, second, 1, 3).flatten(2)
    result = _project(merged, weights.out_weight, weights.out_bias, plan, options, is_flat=True)
    return result, attention


def _merge_masks(
    query: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, options: AttentionOptions
) -> Tensor | None:
    """Return what is added to the scores, with four axes, or None."""
    if options.is_causal and key_padding_mask is None and not options.need_weights:
        return None
    attn_mask, key_padding_mask = (_to_added(mask, query.dtype) for mask in (attn_mask, key_padding_mask))
    if attn_mask is not None:
        batch = attn_mask.shape[0] // options.heads if attn_mask.dim() == 3 else 1
        attn_mask = attn_mask.view(batch, -1, *attn_mask.shape[-2:])
    if key_padding_mask is None:
        return attn_mask
    batch, length = key_padding_mask.shape
    padding = key_padding_mask.view(batch, 1, 1, length).expand(-1, options.heads, -1, -1)
    return padding if attn_mask is None else attn_mask + padding


def _to_added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _project_inputs(
    query: Tensor, key: Tensor, value: Tensor, weights: AttentionWeights, options: AttentionOptions, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values as ``[T, B, E]``."""
    if weights.packed is not None and key is value:
        if query is key:
            q, k, v = _project_packed(query, weights.packed, weights.bias, plan, options, 3)
            return q, k, v
        width = weights.out_weight.shape[0]
        of_query, of_rest = weights.packed.split([width, 2 * width])
        biases = (None, None) if weights.bias is None else weights.bias.split([width, 2 * width])
        k, v = _project_packed(key, of_rest, biases[1], plan, options, 2)
        return _turn(_project(query, of_query, biases[0], plan, options), options), k, v
    each = weights.apart if weights.packed is None else weights.packed.chunk(3)
    biases = (None, None, None) if weights.bias is None else weights.bias.chunk(3)
    q, k, v = (
        _turn(_project(x, weight, bias, plan, options), options)
        for x, weight, bias in zip((query, key, value), each or (), biases, strict=True)
    )
    return q, k, v


def _turn(x: Tensor, options: AttentionOptions) -> Tensor:
    return x.transpose(0, 1) if options.batch_first else x


def _split_heads(x: Tensor, heads: int) -> Tensor:
    length, batch, width = x.shape
    rows = x.view(length, batch * heads, width // heads).transpose(0, 1)
    return rows.view(batch, heads, length, width // heads)


def _attend_step_by_step(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """Return the output ``[B, heads, T, D]`` and the weights, by PyTorch's long way."""
    batch, heads, length, features = q.shape
    q, k, v = (part.reshape(batch * heads, part.shape[2], features) for part in (q, k, v))
    scaled = q * math.sqrt(1.0 / float(features))
    if mask is None:
        attention = torch.bmm(scaled, k.transpose(-2, -1))
    else:
        shape = (batch, heads, *mask.shape[-2:])
        added = mask if mask.shape[:2] == (1, 1) else mask.expand(shape)
        attention = torch.baddbmm(added.reshape(-1, *mask.shape[-2:]), scaled, k.transpose(-2, -1))
    attention = attention.softmax(dim=-1)
    if options.dropout > 0.0:
        attention = functional.dropout(attention, p=options.dropout)
    output = torch.bmm(attention, v).view(batch, heads, length, features)
    attention = attention.view(batch, heads, length, attention.shape[-1])
    return output, attention.mean(dim=1) if options.average_weights else attention


def _project_packed(
    x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, options: AttentionOptions, parts: int
) -> Tensor:
    """Return several projections of one input as ``[parts, T, B, E]``."""
    return _project(x, weight, bias, plan, options, parts=parts)


def _project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: Plan,
    options: AttentionOptions,
    *,
    is_flat: bool = False,
    parts: int = 1,
) -> Tensor:
    """Return ``x @ weight.T + bias`` in the order of `x`; for several parts as ``[parts, T, B, E]``."""
    if not is_row_wise(plan):
        return _project_alone(x, weight, bias, plan, options, is_flat=is_flat, parts=parts)
    if is_held_back(plan):
        return call(x, (weight, bias), plan, "projection", options.batch_first, is_flat, parts)
    may_rebuild = plan.recompute and (current_scope() is not None or may_tag())
    chain = chain_of(x)
    if chain is not None and any(link.stage.multiplies for link in chain.links) and chain.cotangent != plan.cotangent:
        chain = None
    if chain is not None and not may_rebuild:
        chain = settle(chain)
    keeps_root = may_rebuild and plan.root_use is not None and plan.root_use.is_kept and not is_flat
    if plan.stored is not None and ((chain is None and keeps_root) or is_held_by_attention(x)):
        plan = dataclasses.replace(plan, stored=None)
    x, weight, bias = cast_for_autocast(x, weight, bias) if chain is None else (x, *cast_for_autocast(weight, bias))
    stage = ProjectionStage(plan.stored, is_flat, options.batch_first)
    root = held_root(chain) if chain is not None else x
    may_be_tagged = may_rebuild and may_tag() and not is_flat and root is not None
    output = run_stage(x, stage, (weight, bias), plan.cotangent, chain, Tag() if may_be_tagged else None)
    arranged = output if parts == 1 else unpack(_turn(output, options), parts)
    if may_rebuild and not is_flat:
        # The root of a chain of norms, or the input itself, is held by others or for all three projections.
        before = chain.links if chain is not None else ()
        again = dataclasses.replace(stage, stored=None, parts=parts, use=None if before else plan.root_use)
        if root is not None:
            let_rebuild(arranged, root, (*before, Link(again, (weight, bias), ())))
    return arranged


def run_projection(
    x: Tensor,
    parameters: tuple[Tensor | None, ...],
    plan: Plan,
    numbers: tuple[float, ...],
    batch_first: bool,
    is_flat: bool,
    parts: int,
) -> Tensor:
    """Return one or several projections of an input, as a layer of compiled graphs."""
    weight, bias = parameters
    options = AttentionOptions(heads=1, batch_first=batch_first)
    return _project(x, present(weight), bias, plan, options, is_flat=is_flat, parts=parts)


def _project_alone(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: Plan,
    options: AttentionOptions,
    *,
    is_flat: bool,
    parts: int,
) -> Tensor:
    """Return the same by a sketched linear layer of its own."""
    rows = _turn(x, options)
    if is_flat:
        flat = sketched_linear(rows.reshape(-1, rows.shape[-1]), weight, bias, plan, examples=rows.shape[0])
        output = flat.view(*rows.shape[:-1], flat.shape[-1])
    else:
        output = sketched_linear(rows, weight, bias, plan)
    return unpack(output, parts) if parts > 1 else _turn(output, options)
