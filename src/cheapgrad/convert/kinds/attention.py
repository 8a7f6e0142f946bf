"""PyTorch's attention module: four projections in one, read as parameters and never called as layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cheapgrad.convert.kinds.layer_kind import LayerKind, runs_stock_forward
from cheapgrad.convert.kinds.products import why_not_product
from cheapgrad.ops.attention import AttentionOptions, AttentionWeights, multihead_attention
from cheapgrad.ops.plan import Plan
from cheapgrad.sketch import AbstractStrategy, LayerShape, Moment
from cheapgrad.sketch.law import dense_bytes, dense_flops

# Sizes of the projections: of queries, of keys, of values, and of the output.
_Shapes = tuple[LayerShape, ...]


def _run_attention(
    module: Any,
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    arguments = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
    if not _is_covered(module, query, key, value, arguments):
        return nn.MultiheadAttention.forward(module, query, key, value, *arguments)
    options = AttentionOptions(
        heads=module.num_heads,
        dropout=module.dropout,
        batch_first=module.batch_first,
        need_weights=need_weights,
        average_weights=average_attn_weights,
        is_causal=is_causal,
    )
    return multihead_attention(
        query,
        key,
        value,
        _weights_of(module),
        options,
        plan,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
    )


def _is_covered(module: Any, query: Tensor, key: Tensor, value: Tensor, arguments: tuple[Any, ...]) -> bool:
    """Tell whether one call is of the usual form; PyTorch's own code runs for the others, and says what is wrong."""
    padding, _, mask, _, is_causal = arguments
    if any(tensor.dim() != 3 or tensor.is_nested for tensor in (query, key, value)):
        return False
    batch, length = query.shape[:2] if module.batch_first else query.shape[1::-1]
    source = key.shape[1 if module.batch_first else 0]
    if query.shape[2] != module.embed_dim or key.shape[2] != module.kdim or value.shape[2] != module.vdim:
        return False
    if key.shape[:2] != value.shape[:2] or key.shape[0 if module.batch_first else 1] != batch:
        return False
    if is_causal and mask is None:
        return False
    if any(given is not None and given.dtype not in (torch.bool, query.dtype) for given in (mask, padding)):
        return False
    if mask is not None and padding is not None and mask.dtype != padding.dtype:
        return False
    if padding is not None and padding.shape != (batch, source):
        return False
    return mask is None or mask.shape in ((length, source), (batch * module.num_heads, length, source))


def _weights_of(module: Any) -> AttentionWeights:
    apart = None
    if module.in_proj_weight is None:
        apart = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    return AttentionWeights(
        module.in_proj_weight, apart, module.in_proj_bias, module.out_proj.weight, module.out_proj.bias
    )


def _why_not(module: Any, strategy: AbstractStrategy, moment: Moment) -> str:
    if module.bias_k is not None or module.bias_v is not None:
        return "not covered: add_bias_kv=True puts rows of their own among keys and values; stock code runs"
    if module.add_zero_attn:
        return "not covered: add_zero_attn=True puts a row of zeros among keys and values; stock code runs"
    return why_not_product(module.out_proj, strategy, moment)


def _shapes(module: Any, x: Tensor, output: Tensor) -> _Shapes:
    """Return the sizes of the four projections; keys and values as if they had the rows of the queries."""
    rows, width = output.numel() // output.shape[-1], module.embed_dim
    examples = x.shape[0] if x.dim() > 2 else 1
    return tuple(
        LayerShape(rows, inputs, width, examples, output.element_size())
        for inputs in (width, module.kdim, module.vdim, width)
    )


def _flops(strategy: AbstractStrategy | None, moment: Moment, shapes: _Shapes) -> float:
    return sum(dense_flops(shape) if strategy is None else strategy.law.flops(shape, moment) for shape in shapes)


def _saved_bytes(strategy: AbstractStrategy | None, moment: Moment, shapes: _Shapes) -> float:
    # One input for queries, keys and values, and that of the output.
    held = (shapes[0], shapes[3])
    return sum(dense_bytes(shape) if strategy is None else strategy.law.saved_bytes(shape, moment) for shape in held)


ATTENTION = LayerKind(
    name="MultiheadAttention",
    accepts=runs_stock_forward(nn.MultiheadAttention),
    run=_run_attention,
    sizes=lambda module: (module.embed_dim, module.embed_dim),
    shape=_shapes,
    flops=_flops,
    saved_bytes=_saved_bytes,
    # Its projections have inputs and cotangents of their own.
    variance=None,
    cotangent_rows=lambda cotangent: cotangent.reshape(-1, cotangent.shape[-1]),
    cotangent_like=lambda rows_NO, cotangent: rows_NO.view(cotangent.shape),
    why_not=_why_not,
    least_weights={Moment.STORED: 128 * 128, Moment.COTANGENT: 128 * 128},
    input_name="query",
    weights=lambda module: module.embed_dim**2,
)
