"""What kinds have in common that multiply no matrices and keep something other than their input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cheapgrad.convert.kinds.layer_kind import LayerKind, LayerUse, runs_stock_forward
from cheapgrad.sketch import AbstractStrategy, Moment, StochasticRounding, Variance


def why_not_codes(module: nn.Module, strategy: AbstractStrategy, moment: Moment) -> str:
    """Return why a strategy is left out where only what is stored can shrink, or an empty string."""
    name, text = type(module).__name__, type(strategy).__name__
    if moment is Moment.COTANGENT:
        return f"cotangent: {text} saves nothing in {name}, which multiplies no matrices"
    if not isinstance(strategy, StochasticRounding):
        return (
            f"stored: {text} has no meaning for {name}, whose gradient needs every entry (StochasticRounding is stored)"
        )
    return ""


def no_variance(module: Any, strategy: AbstractStrategy, moment: Moment, use: LayerUse, memory: Any) -> Variance:
    """Return no variance: the gradient is exact."""
    zero = torch.zeros((), dtype=torch.float64)
    return Variance(zero, zero)


def element_wise_kind(
    stock: type[nn.Module],
    run: Callable[..., Tensor],
    *,
    shape: Callable[[Any, Tensor, Tensor], Any],
    saved_bytes: Callable[[AbstractStrategy | None, Moment, Any], float],
    variance: Callable[..., Variance] = no_variance,
    why_not: Callable[[nn.Module, AbstractStrategy, Moment], str] = why_not_codes,
    draws_codes: bool = True,
) -> LayerKind:
    """Return the kind of a module that has no products to save."""
    return LayerKind(
        name=stock.__name__,
        accepts=runs_stock_forward(stock),
        run=run,
        sizes=None,
        shape=shape,
        flops=lambda strategy, moment, shape: 0.0,
        saved_bytes=saved_bytes,
        variance=variance,
        cotangent_rows=lambda cotangent: cotangent.reshape(cotangent.shape[0], -1),
        cotangent_like=lambda rows_NO, cotangent: rows_NO.view(cotangent.shape),
        why_not=why_not,
        least_weights={Moment.STORED: 0, Moment.COTANGENT: 0},
        draws_codes=draws_codes,
    )
