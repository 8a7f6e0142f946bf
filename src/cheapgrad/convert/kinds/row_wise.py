"""Modules that work row by row and multiply nothing: norms over features, and activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cheapgrad.convert.kinds.element_wise import element_wise_kind, no_variance
from cheapgrad.convert.kinds.layer_kind import LayerKind, LayerUse
from cheapgrad.ops.activation import Activation
from cheapgrad.ops.activations import features_of
from cheapgrad.ops.chains.activation_stage import ActivationStage
from cheapgrad.ops.chains.joining import is_row_wise, overwrite, stage_in_chain
from cheapgrad.ops.chains.norm_stage import LayerNormStage
from cheapgrad.ops.chains.rebuilding import current_scope
from cheapgrad.ops.plan import Plan
from cheapgrad.ops.row_laws import norm_codes_bytes, norm_law, slope_law
from cheapgrad.ops.stored_derivative import derivative_saved_bytes
from cheapgrad.sketch import AbstractStrategy, Moment, StochasticRounding, Variance
from cheapgrad.sketch.law import Law


def why_not_row_wise(module: nn.Module, strategy: AbstractStrategy, moment: Moment) -> str:
    """Return why a strategy is left out for a norm or an activation, or an empty string."""
    name = type(module).__name__
    if len(getattr(module, "normalized_shape", (0,))) != 1:
        return f"unsupported: {name} normalises over several axes; the last one alone is covered"
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
    return stage_in_chain(x, stage, (module.weight, module.bias), plan)


def _run_activation(stock: type[nn.Module], activation_of: Callable[[Any], Activation]) -> Callable[..., Tensor]:
    def run(module: Any, plan: Plan, x: Tensor) -> Tensor:
        activation = activation_of(module)
        if getattr(module, "inplace", False):
            return overwrite(x, plan, activation)
        stage = ActivationStage(activation, plan.stored)
        return stage_in_chain(x, stage, (), plan)

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
    nn.Softsign: ("softsign", ()),
    nn.Tanhshrink: ("tanhshrink", ()),
    nn.ELU: ("elu", ("alpha",)),
    nn.CELU: ("celu", ("alpha",)),
    nn.SELU: ("selu", ()),
    nn.ReLU: ("relu", ()),
    nn.LeakyReLU: ("leaky_relu", ("negative_slope",)),
    nn.ReLU6: ("relu6", ()),
    nn.Hardtanh: ("hardtanh", ("min_val", "max_val")),
    nn.Hardsigmoid: ("hardsigmoid", ()),
    nn.Hardshrink: ("hardshrink", ("lambd",)),
    nn.Softshrink: ("softshrink", ("lambd",)),
    nn.Threshold: ("threshold", ("threshold", "value")),
}


def _activation_of(name: str, options: tuple[str, ...]) -> Callable[[Any], Activation]:
    return lambda module: Activation(name, tuple((option, getattr(module, option)) for option in options))


@dataclass(frozen=True)
class RowShape:
    """Sizes of one use of a norm over features or an activation.

    Attributes:
        rows: N.
        features: I.
        stock_bytes: bytes that PyTorch holds.
        root_bytes: bytes per row of the factor ``1 / sqrt(...)`` that a norm holds besides its codes.
        wants_input: whether the input needs a gradient.
    """

    rows: int
    features: int
    stock_bytes: int
    root_bytes: int = 0
    wants_input: bool = True


def _layer_norm_shape(module: Any, x: Tensor, output: Tensor) -> RowShape:
    rows, features = x.numel() // x.shape[-1], x.shape[-1]
    statistic_bytes = (x if module.weight is None else module.weight).element_size()
    stock_bytes = rows * (features * x.element_size() + 2 * statistic_bytes)
    return RowShape(rows, features, stock_bytes, x.element_size(), x.requires_grad)


def norm_saved_bytes(strategy: AbstractStrategy | None, moment: Moment, shape: RowShape) -> float:
    """Return the bytes held by a norm: PyTorch's, or a factor per row and two codes."""
    if not isinstance(strategy, StochasticRounding):
        return float(shape.stock_bytes)
    return norm_codes_bytes(strategy, shape.rows, shape.features, shape.root_bytes)


def activation_shape(name: str) -> Callable[[Any, Tensor, Tensor], RowShape]:
    """Return what tells the sizes of one use of an activation of that name from module, input and output."""

    def shape(module: Any, x: Tensor, output: Tensor) -> RowShape:
        features = features_of(x.shape)
        stock_bytes = Activation(name).stock_tensors(x.device.type) * x.numel() * x.element_size()
        return RowShape(x.numel() // max(features, 1), features, stock_bytes, wants_input=x.requires_grad)

    return shape


def activation_bytes(name: str) -> Callable[[AbstractStrategy | None, Moment, RowShape], float]:
    """Return how many bytes an activation of that name holds, as a function of strategy, moment and sizes."""

    def saved_bytes(strategy: AbstractStrategy | None, moment: Moment, shape: RowShape) -> float:
        if not shape.wants_input:
            return 0.0
        if not isinstance(strategy, StochasticRounding):
            return float(shape.stock_bytes)
        return float(derivative_saved_bytes(Activation(name), strategy, shape.rows, shape.features))

    return saved_bytes


def variance_by(law_of: Callable[[Any, StochasticRounding], Law], *, may_keep_input: bool = False) -> Any:
    """Return the `variance` of a kind whose codes have a law of their own.

    Args:
        law_of: (module, codec) to the law.
        may_keep_input: whether the codes are left out where an attention keeps the input anyway, as norms do.
    """

    def variance(module: Any, strategy: AbstractStrategy, moment: Moment, use: LayerUse, memory: Any) -> Variance:
        root_use = module._cheapgrad.plan.root_use if may_keep_input else None
        is_kept = root_use is not None and root_use.is_kept
        if is_kept or moment is not Moment.STORED or not isinstance(strategy, StochasticRounding):
            return no_variance(module, strategy, moment, use, memory)
        features = use.input.shape[-1] if use.input.dim() else 1
        matrices = (tensor.detach().reshape(-1, features) for tensor in (use.input, use.cotangent))
        found = law_of(module, strategy).variance(*matrices, moment=moment)
        return found if use.wants_input else Variance(torch.zeros_like(found.input), found.weight)

    return variance


def _layer_norm_law(module: Any, codec: StochasticRounding) -> Law:
    return norm_law(codec, module.eps, module.weight, centred=True)


def row_wise_kind(
    stock: type[nn.Module],
    run: Callable[..., Tensor],
    *,
    shape: Callable[[Any, Tensor, Tensor], Any],
    saved_bytes: Callable[[AbstractStrategy | None, Moment, Any], float],
    variance: Callable[..., Variance] = no_variance,
    input_name: str = "input",
    draws_codes: bool = True,
) -> LayerKind:
    """Return the kind of a module that works row by row and multiplies nothing."""
    kind = element_wise_kind(
        stock,
        run,
        shape=shape,
        saved_bytes=saved_bytes,
        variance=variance,
        why_not=why_not_row_wise,
        draws_codes=draws_codes,
    )
    return dataclasses.replace(kind, input_name=input_name, row_wise=True)


def _activation_kind(stock: type[nn.Module], name: str, options: tuple[str, ...]) -> LayerKind:
    activation_of = _activation_of(name, options)
    return row_wise_kind(
        stock,
        _run_activation(stock, activation_of),
        shape=activation_shape(name),
        saved_bytes=activation_bytes(name),
        variance=variance_by(lambda module, codec: slope_law(activation_of(module), codec)),
        draws_codes=Activation(name).slope_kind == "smooth",
    )


ROW_WISE = (
    row_wise_kind(
        nn.LayerNorm,
        _run_layer_norm,
        shape=_layer_norm_shape,
        saved_bytes=norm_saved_bytes,
        variance=variance_by(_layer_norm_law, may_keep_input=True),
    ),
    *(_activation_kind(stock, name, options) for stock, (name, options) in _ACTIVATIONS.items()),
)
