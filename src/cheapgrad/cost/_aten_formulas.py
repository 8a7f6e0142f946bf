"""FLOPs of PyTorch's own operations: two for every multiplication whose product is added up.

Where `torch.utils.flop_counter` is right, its formulas are used. Written here is what it gets wrong or leaves out:

* the weight gradient of a grouped convolution (it counts ``groups`` times too much),
* fused attention on the CPU (0 there), and its counterpart for other accelerators,
* the recurrent layers of oneDNN and cuDNN (0 there),
* products with a vector, bilinear forms, weighted embedding bags, the fused layers of inference (0 there),
* products with a sparse matrix (counted there as if it were dense).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Formula = Callable[..., int]

_DENSE = torch.strided


def _nonzeros(tensor: Tensor) -> int:
    return tensor.numel() if tensor.layout is _DENSE else tensor._nnz()


def _mm(left: Tensor, right: Tensor, *_: Any, out: Any, **__: Any) -> int:
    if left.layout is _DENSE and right.layout is not _DENSE:
        return 2 * _nonzeros(right) * left.shape[0]
    return 2 * _nonzeros(left) * right.shape[1]


def _addmm(added: Any, left: Tensor, right: Tensor, *_: Any, out: Any, **__: Any) -> int:
    return _mm(left, right, out=out)


def _mv(matrix: Tensor, vector: Any, *, out: Any) -> int:
    return 2 * _nonzeros(matrix)


def _addmv(added: Any, matrix: Tensor, vector: Any, *, out: Any, **_: Any) -> int:
    return 2 * _nonzeros(matrix)


def _dot(left: Tensor, right: Any, *, out: Any) -> int:
    return 2 * left.numel()


def _addbmm(added: Any, left: Tensor, right: Tensor, *, out: Any, **_: Any) -> int:
    return 2 * left.numel() * right.shape[2]


def _linear(x: Tensor, weight: Tensor, *_: Any, out: Any, **__: Any) -> int:
    return 2 * math.prod(x.shape[:-1]) * weight.numel()


def _trilinear(first: Tensor, second: Tensor, third: Tensor, *expansions: Any, out: Tensor, unroll_dim: int = 1) -> int:
    """The sum over `sumdim` of three factors: two multiplications and one addition for each term."""
    shapes = []
    for tensor, expand in zip((first, second, third), expansions[:3], strict=True):
        shape = list(tensor.shape)
        for axis in sorted(expand):
            shape.insert(axis, 1)
        shapes.append(shape)
    terms = math.prod(max(sizes) for sizes in zip(*shapes, strict=True))
    return 3 * terms


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    output_mask: Any,
    *,
    out: Any,
) -> int:
    """Each of dX and dW takes as much as the forward pass: every weight meets the pixels its window slides over."""
    pixels = math.prod((x if transposed else grad).shape[2:])
    return (bool(output_mask[0]) + bool(output_mask[1])) * 2 * x.shape[0] * pixels * weight.numel()


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """Scores and weighted values; masks and causality skip nothing in this count."""
    positions = math.prod(query.shape[:-1])
    return 2 * positions * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward(grad: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, out: Any, **__: Any) -> int:
    """Scores once more, dV, the cotangent of the scores, dQ and dK."""
    positions = math.prod(query.shape[:-1])
    return 2 * positions * key.shape[-2] * (3 * query.shape[-1] + 2 * value.shape[-1])


def _rows(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def _onednn_rnn(x: Tensor, weight_ih: Tensor, weight_hh: Tensor, *_: Any, out: Any) -> int:
    return 2 * _rows(x) * (weight_ih.numel() + weight_hh.numel())


def _onednn_rnn_backward(x: Tensor, weight_ih: Tensor, weight_hh: Tensor, *_: Any, out: Any) -> int:
    """All gradients are computed, whether they are needed or not."""
    return 2 * _onednn_rnn(x, weight_ih, weight_hh, out=out)


def _cudnn_rnn(x: Tensor, weights: list[Tensor], *_: Any, out: Any) -> int:
    return 2 * _rows(x) * sum(weight.numel() for weight in weights if weight.dim() == 2)


def _cudnn_rnn_backward(x: Tensor, weights: list[Tensor], *rest: Any, out: Any) -> int:
    wants_weights = bool(rest[-1][3])
    return (1 + wants_weights) * _cudnn_rnn(x, weights, out=out)


def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Any,
    scale_by_frequency: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    *_: Any,
    out: Any,
    **__: Any,
) -> int:
    """Rows that are only added up take no product; weighted ones take one for each entry."""
    return 0 if per_sample_weights is None else 2 * indices.numel() * weight.shape[1]


def _embedding_bag_backward(grad: Tensor, indices: Tensor, *rest: Any, out: Any) -> int:
    weighted = any(isinstance(item, Tensor) and item.is_floating_point() for item in rest[4:])
    return 2 * indices.numel() * grad.shape[1] if weighted else 0


def _embedding_bag_weights_backward(grad: Tensor, weight: Any, indices: Tensor, *_: Any, out: Any) -> int:
    return 2 * indices.numel() * grad.shape[1]


def _fused_attention_layer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Any,
    proj_weight: Tensor,
    *_: Any,
    out: Any,
    **__: Any,
) -> int:
    projections = (_rows(query) + _rows(key) + _rows(value)) * 2 * width * width + _linear(query, proj_weight, out=out)
    return projections + 2 * _rows(query) * key.shape[-2] * 2 * width


def _fused_encoder_layer(
    x: Tensor, width: int, heads: int, qkv_weight: Tensor, qkv_bias: Any, proj_weight: Tensor, *rest: Any, out: Any
) -> int:
    feedforward = sum(weight.numel() for weight in (rest[8], rest[10]))
    attention = _fused_attention_layer(x, x, x, width, heads, qkv_weight, qkv_bias, proj_weight, out=out)
    return attention + 2 * _rows(x) * feedforward


def _nothing(*_: Any, out: Any, **__: Any) -> int:
    return 0


_OURS: dict[str, Formula] = {
    "mm": _mm,
    "_sparse_mm": _mm,
    "_int_mm": _mm,
    "addmm": _addmm,
    "_sparse_addmm": _addmm,
    "_addmm_activation": _addmm,
    "mv": _mv,
    "addmv": _addmv,
    "dot": _dot,
    "vdot": _dot,
    "addbmm": _addbmm,
    "linear": _linear,
    "mkldnn_linear": _linear,
    "_trilinear": _trilinear,
    "convolution_backward": _convolution_backward,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
    "mkldnn_rnn_layer": _onednn_rnn,
    "mkldnn_rnn_layer_backward": _onednn_rnn_backward,
    "_cudnn_rnn": _cudnn_rnn,
    "_cudnn_rnn_backward": _cudnn_rnn_backward,
    "miopen_rnn": _cudnn_rnn,
    "miopen_rnn_backward": _cudnn_rnn_backward,
    # Lookups copy rows, and their gradients add rows up.
    "embedding": _nothing,
    "embedding_dense_backward": _nothing,
    "_embedding_bag": _embedding_bag,
    "_embedding_bag_forward_only": _embedding_bag,
    "_embedding_bag_backward": _embedding_bag_backward,
    "_embedding_bag_dense_backward": _embedding_bag_backward,
    "_embedding_bag_per_sample_weights_backward": _embedding_bag_weights_backward,
    "_native_multi_head_attention": _fused_attention_layer,
    "_transformer_encoder_layer_fwd": _fused_encoder_layer,
}


@functools.cache
def aten_formulas() -> dict[Any, Formula]:
    """Return the formulas written here, by operation; an operation that this PyTorch lacks is left out."""
    found = {getattr(torch.ops.aten, name, None): formula for name, formula in _OURS.items()}
    found.pop(None, None)
    return found
