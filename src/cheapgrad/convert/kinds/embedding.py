"""The table of an embedding: a gradient from drawn tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cheapgrad.convert.kinds.layer_kind import LayerKind, LayerUse, runs_stock_forward
from cheapgrad.ops.embedding import sketched_embedding
from cheapgrad.ops.plan import Plan
from cheapgrad.sketch import AbstractStrategy, ExampleSample, LayerShape, LayerTensors, Moment, RowSample, Variance
from cheapgrad.sketch._row_sampling import AbstractRowSampling


def _run_embedding(module: Any, plan: Plan, tokens: Tensor) -> Tensor:
    if not isinstance(plan.cotangent, AbstractRowSampling):
        return nn.Embedding.forward(module, tokens)
    return sketched_embedding(
        tokens, module.weight, plan.cotangent, padding=module.padding_idx, by_frequency=module.scale_grad_by_freq
    )


def _why_not(module: Any, strategy: AbstractStrategy, moment: Moment) -> str:
    if moment is Moment.STORED:
        return "stored: an embedding keeps its tokens alone; there is nothing to encode"
    if module.sparse:
        return "not covered: sparse=True gives the gradient of the rows that occur alone; stock code runs"
    if module.max_norm is not None:
        return "not covered: max_norm= overwrites rows of the table in the forward pass; stock code runs"
    if not isinstance(strategy, AbstractRowSampling):
        return f"cotangent: {type(strategy).__name__} has no meaning for Embedding; draw tokens (RowSample)"
    return ""


def _shape(module: Any, tokens: Tensor, output: Tensor) -> LayerShape:
    examples = tokens.shape[0] if tokens.dim() > 1 else 1
    return LayerShape(tokens.numel(), 1, output.shape[-1], examples, output.element_size())


def _variance(module: Any, strategy: AbstractStrategy, moment: Moment, use: LayerUse, memory: Any) -> Variance:
    tokens_N = use.input.reshape(-1)
    grad_ND = use.cotangent.reshape(tokens_N.numel(), -1)
    if module.padding_idx is not None:
        grad_ND = grad_ND * (tokens_N != module.padding_idx).unsqueeze(1)
    # One column for every token that occurs: the others have no gradient.
    _, place_N, counts = tokens_N.unique(return_inverse=True, return_counts=True)
    if module.scale_grad_by_freq:
        grad_ND = grad_ND / counts[place_N].unsqueeze(1)
    one_hot = torch.nn.functional.one_hot(place_N).to(grad_ND.dtype)
    tensors = LayerTensors(one_hot, grad_ND, None, use.examples)
    return strategy.variance_with_memory(tensors, moment, memory)


EMBEDDING = LayerKind(
    name="Embedding",
    accepts=runs_stock_forward(nn.Embedding),
    run=_run_embedding,
    sizes=None,
    shape=_shape,
    flops=lambda strategy, moment, shape: 0.0,
    saved_bytes=lambda strategy, moment, shape: 0.0,
    variance=_variance,
    cotangent_rows=lambda cotangent: cotangent.reshape(-1, cotangent.shape[-1]),
    cotangent_like=lambda rows_NO, cotangent: rows_NO.view(cotangent.shape),
    why_not=_why_not,
    least_weights={Moment.STORED: 0, Moment.COTANGENT: 0},
    # The sum writes the whole table, however few the tokens are.
    slow_cotangents=(RowSample, ExampleSample),
)
