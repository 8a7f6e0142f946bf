"""Modules that work row by row and multiply nothing: norms over features, and activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cheapgrad.convert.kinds.layer_kind import LayerKind, runs_stock_forward
from cheapgrad.convert.kinds.linear import matrix_shape
from cheapgrad.ops.activations import Activation, sketched_activation
from cheapgrad.ops.chains.activation_stage import ActivationStage
from cheapgrad.ops.chains.joining import is_row_wise, stage_in_chain
from cheapgrad.ops.chains.norm_stage import LayerNormStage
from cheapgrad.ops.chains.rebuilding import current_scope
from cheapgrad.ops.plan import Plan
from cheapgrad.sketch import AbstractStrategy, Moment, Variance

_ZERO = torch.zeros((), dtype=torch.float64)


def why_not_row_wise(module: nn.Module, strategy: AbstractStrategy, moment: Moment) -> str:
    """Return why a strategy is left out for a norm or an activation, or an empty string."""
    name = type(module).__name__
    alone = Plan(stored=strategy) if moment is Moment.STORED else Plan(cotangent=strategy)
    if not is_row_wise(alone):
        kinds = "stochastic rounding is stored" if moment is Moment.STORED else "rows drawn by the cotangent alone"
        return f"{moment.value}: {type(strategy).__name__} has no meaning for {name}; it works row by row ({kinds})"
    return ""


def _run_layer_norm(module: Any, plan: Plan, x: Tensor) -> Tensor:
    if len(module.normalized_shape) != 1:
        return nn.LayerNorm.forward(module, x)
    stage = LayerNormStage(module.eps, module.normalized_shape[0], plan.stored, plan.root_use)
    if plan.root_use is not None and plan.root_use.is_kept and current_scope() is not None:
        stage = dataclasses.replace(stage, stored=None)
    return stage_in_chain(x, stage, (module.weight, module.bias), lambda: nn.LayerNorm.forward(module, x))


def _run_activation(activation_of: Callable[[Any], Activation]) -> Callable[..., Tensor]:
    def run(module: Any, plan: Plan, x: Tensor) -> Tensor:
        activation = activation_of(module)
        stage = ActivationStage(activation, plan.stored)
        return stage_in_chain(x, stage, (), lambda: sketched_activation(x, activation, plan.stored))

    return run


# Stock module -> its activation, and the names of the attributes that are options.
_ACTIVATIONS: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.GELU: ("gelu", ("approximate",)),
    nn.SiLU: ("silu", ()),
    nn.Mish: ("mish", ()),
    nn.Hardswish: ("hardswish", ()),
    nn.Tanh: ("tanh", ()),
    nn.Sigmoid: ("sigmoid", ()),
    nn.Softplus: ("softplus", ("beta", "threshold")),
    nn.LogSigmoid: ("log_sigmoid", ()),
    nn.ELU: ("elu", ("alpha",)),
    nn.CELU: ("celu", ("alpha",)),
    nn.SELU: ("selu", ()),
    nn.ReLU: ("relu", ()),
    nn.LeakyReLU: ("leaky_relu", ("negative_slope",)),
    nn.ReLU6: ("relu6", ()),
    nn.Hardtanh: ("hardtanh", ("min_val", "max_val")),
    nn.Hardsigmoid: ("hardsigmoid", ()),
}


def _activation_of(name: str, options: tuple[str, ...]) -> Callable[[Any], Activation]:
    return lambda module: Activation(name, tuple((option, getattr(module, option)) for option in options))


def row_wise_kind(stock: type[nn.Module], run: Callable[..., Tensor]) -> LayerKind:
    """Return the kind of a module that works row by row and multiplies nothing."""
    return LayerKind(
        name=stock.__name__,
        accepts=runs_stock_forward(stock),
        run=run,
        sizes=None,
        shape=matrix_shape,
        flops=lambda strategy, moment, shape: 0.0,
        saved_bytes=lambda strategy, moment, shape: 0.0,
        variance=lambda module, strategy, moment, use, memory: Variance(_ZERO, _ZERO),
        cotangent_rows=lambda cotangent: cotangent.reshape(-1, cotangent.shape[-1]),
        cotangent_like=lambda rows_NO, cotangent: rows_NO.view(cotangent.shape),
        why_not=why_not_row_wise,
        least_weights={Moment.STORED: 0, Moment.COTANGENT: 0},
        row_wise=True,
    )


ROW_WISE = (
    row_wise_kind(nn.LayerNorm, _run_layer_norm),
    *(
        row_wise_kind(stock, _run_activation(_activation_of(name, options)))
        for stock, (name, options) in _ACTIVATIONS.items()
    ),
)
