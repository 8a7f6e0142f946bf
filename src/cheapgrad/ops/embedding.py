"""Look-up of rows of a table, whose gradient is made from a sample of the tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cheapgrad.ops._guards import differentiate_once, refuse_forward_mode
from cheapgrad.sketch import Moment, Operands
from cheapgrad.sketch._row_sampling import AbstractRowSampling

_NAME = "embedding"


class _SketchedEmbedding(torch.autograd.Function):
    """Forward is PyTorch's; backward adds up the rows of drawn tokens."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        tokens: Tensor,
        weight: Tensor,
        padding: int | None,
        by_frequency: bool,
        strategy: AbstractRowSampling,
        examples: int,
    ) -> Tensor:
        return torch.nn.functional.embedding(tokens, weight, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tokens, weight, ctx.padding, ctx.by_frequency, ctx.strategy, ctx.examples = inputs
        ctx.rows = weight.shape[0]
        ctx.save_for_backward(tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        with torch.no_grad():
            tokens_N, grad_ND = tokens.reshape(-1), grad.reshape(-1, grad.shape[-1])
            counts_N = _token_counts(tokens_N, ctx.rows, ctx.padding, ctx.by_frequency, grad.dtype)
            if counts_N is not None:
                grad_ND = grad_ND * counts_N.unsqueeze(1)
            operands = Operands(Moment.COTANGENT, None, grad_ND, examples=ctx.examples)
            selection = ctx.strategy.select(operands, grad_ND.shape[0])
            drawn_KD = selection.apply(grad_ND, 0)
            # PyTorch's own sum, an order of magnitude faster than adding rows by index.
            tokens_K = tokens_N.index_select(0, selection.index_K)
            gradient = torch.ops.aten.embedding_dense_backward(drawn_KD, tokens_K, ctx.rows, -1, False)
        return None, differentiate_once(gradient, _NAME, grad), None, None, None, None


class _EagerSketchedEmbedding(_SketchedEmbedding):
    """The same, refusing forward mode by name; compiled graphs take no Function that defines a jvp."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        refuse_forward_mode(_NAME)


def _token_counts(
    tokens_N: Tensor, rows: int, padding: int | None, by_frequency: bool, dtype: torch.dtype
) -> Tensor | None:
    """Return what every token's cotangent counts in the exact gradient, or None where all count alike."""
    counts_N = None
    if by_frequency:
        # Of all tokens, not of those drawn.
        occurrences = torch.zeros(rows, dtype=dtype, device=tokens_N.device).index_add(
            0, tokens_N, torch.ones_like(tokens_N, dtype=dtype)
        )
        counts_N = 1 / occurrences.index_select(0, tokens_N)
    if padding is not None:
        is_word_N = (tokens_N != padding).to(dtype)
        counts_N = is_word_N if counts_N is None else counts_N * is_word_N
    return counts_N


def sketched_embedding(
    tokens: Tensor,
    weight: Tensor,
    strategy: AbstractRowSampling,
    *,
    padding: int | None = None,
    by_frequency: bool = False,
) -> Tensor:
    """Return ``weight[tokens]``, the gradient of `weight` made from drawn tokens.

    Args:
        tokens: rows of the table, integers, any shape.
        weight: the table ``[rows, D]``.
        strategy: draws tokens; by default with ``p_n = min(1, lambda ||g_n||)``, the best score here: what a token
            gives to the gradient is ``g_n``, in its row.
        padding: a row that gets no gradient, or None.
        by_frequency: divide each token's part by how often it occurs (among all tokens, not among those drawn).

    Returns:
        In the shape of `tokens` with an axis more.

    **Law** Bias 0, ``Var dW = sum_nm (p_nm / (p_n p_m) - 1) <g_n, g_m> [t_n = t_m]``; K rows are added up instead of N.
    It holds nothing less: an embedding keeps its tokens alone.

    Raises:
        SecondDerivativeError: when a gradient through it is differentiated again.
        ForwardModeError: in forward-mode differentiation.
    """
    if not weight.requires_grad and not torch.compiler.is_compiling() and type(weight) is torch.nn.Parameter:
        return torch.nn.functional.embedding(tokens, weight, padding)
    function = _SketchedEmbedding if torch.compiler.is_compiling() else _EagerSketchedEmbedding
    examples = tokens.shape[0] if tokens.dim() > 1 else 1
    return function.apply(tokens, weight, padding, by_frequency, strategy, examples)
