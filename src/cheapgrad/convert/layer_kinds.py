"""The kinds of modules that can be converted, and how each runs its sketched forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cheapgrad.ops._convolution_geometry import as_images, as_matrix
from cheapgrad.ops.activations import Activation, sketched_activation
from cheapgrad.ops.chains.activation_stage import ActivationStage
from cheapgrad.ops.chains.joining import linear_in_chain, stage_in_chain
from cheapgrad.ops.chains.norm_stage import LayerNormStage, RootUse
from cheapgrad.ops.chains.rebuilding import current_scope
from cheapgrad.ops.convolution import ConvolutionConfig, sketched_convolution
from cheapgrad.ops.convolution_law import (
    ConvolutionShape,
    convolution_flops,
    convolution_saved_bytes,
    convolution_variance,
)
from cheapgrad.ops.plan import Plan
from cheapgrad.sketch import (
    AbstractStrategy,
    ElementMask,
    LayerShape,
    LayerTensors,
    LowRank,
    Moment,
    RowProjection,
    RowSample,
    Variance,
)
from cheapgrad.sketch.law import dense_bytes, dense_flops

# Below this many weights the draw costs more time than the smaller products save, and a layer with few weights has few
# outputs for its rounding noise to be averaged over. A convolution uses every weight at many pixels.
_LINEAR_LIMITS = {Moment.STORED: 128 * 128, Moment.COTANGENT: 128 * 128}
_CONVOLUTION_LIMITS = {Moment.STORED: 0, Moment.COTANGENT: 1024}


@dataclass(frozen=True)
class LayerUse:
    """The tensors of one use of a layer, recorded in an exact pass.

    Attributes:
        input: X, in the layer's own shape.
        cotangent: G, in the shape of the output.
        wants_input: whether the input needs a gradient.
    """

    input: Tensor
    cotangent: Tensor
    wants_input: bool

    @property
    def examples(self) -> int:
        """B: the first axis of an input with at least two."""
        return self.input.shape[0] if self.input.dim() > 1 else 1


@dataclass(frozen=True)
class LayerKind:
    """How a kind of module is converted.

    Attributes:
        name: the stock module's name.
        accepts: tells whether a module's class is of this kind (its forward is the stock one).
        run: ``(module, plan, *inputs) -> output``, bit-identical to the stock forward.
        sizes: module to (input features, output features).
        shape: (module, input, output) to the sizes that costs are functions of.
        flops: (strategy or None for exact, moment, sizes) to the FLOPs of dX and dW.
        saved_bytes: (strategy or None for exact, moment, sizes) to the bytes held in place of X.
        variance: ``(module, strategy, moment, use, memory) -> Variance`` for one use of the layer.
        cotangent_rows: ``(cotangent) -> [N, O]``, the matrix that strategies sketch.
        cotangent_like: ``([N, O], cotangent) -> `` a stand-in in the cotangent's shape.
        input_name: what the stock forward calls its first argument.
        slow_cotangents: strategies that are unbiased for the cotangent but save no time here.
        least_weights: layers with fewer weights are too small to pay, by moment.
        row_wise: whether it has no products to save and matters only as a stage of a chain.
        new_memory: makes what a module remembers from one forward pass to the next, whatever its strategy.
    """

    name: str
    accepts: Callable[[type[nn.Module]], bool]
    run: Callable[..., Tensor]
    sizes: Callable[[Any], tuple[int, int]]
    shape: Callable[[Any, Tensor, Tensor], Any]
    flops: Callable[[AbstractStrategy | None, Moment, Any], float]
    saved_bytes: Callable[[AbstractStrategy | None, Moment, Any], float]
    variance: Callable[[Any, AbstractStrategy, Moment, LayerUse, Any], Variance]
    cotangent_rows: Callable[[Tensor], Tensor]
    cotangent_like: Callable[[Tensor, Tensor], Tensor]
    least_weights: Mapping[Moment, int]
    input_name: str = "input"
    slow_cotangents: tuple[type[AbstractStrategy], ...] = ()
    row_wise: bool = False
    new_memory: Callable[[], Any] = lambda: None


# What a stock forward calls on its own module: a subclass that overrides one of these has another forward.
_FORWARD_PARTS = ("forward", "_conv_forward", "_output_padding")


def _runs_stock_forward(stock: type[nn.Module]) -> Callable[[type[nn.Module]], bool]:
    parts = [part for part in _FORWARD_PARTS if part in dir(stock)]
    return lambda cls: issubclass(cls, stock) and all(getattr(cls, part) is getattr(stock, part) for part in parts)


def _run_linear(module: Any, plan: Plan, x: Tensor) -> Tensor:
    return linear_in_chain(x, module.weight, module.bias, plan)


def _matrix_shape(module: Any, x: Tensor, output: Tensor) -> LayerShape:
    return LayerShape(
        rows=output.numel() // output.shape[-1],
        inputs=x.shape[-1],
        outputs=output.shape[-1],
        examples=x.shape[0] if x.dim() > 1 else 1,
        element_bytes=output.element_size(),
    )


def _matrix_variance(
    strategy: AbstractStrategy, moment: Moment, use: LayerUse, memory: Any, weight_OI: Tensor
) -> Variance:
    tensors = LayerTensors(
        use.input.reshape(-1, use.input.shape[-1]),
        use.cotangent.reshape(-1, use.cotangent.shape[-1]),
        weight_OI.detach() if use.wants_input else None,
        use.examples,
    )
    return strategy.variance_with_memory(tensors, moment, memory)


def _matrix_flops(strategy: AbstractStrategy | None, moment: Moment, shape: LayerShape) -> float:
    return dense_flops(shape) if strategy is None else strategy.law.flops(shape, moment)


def _matrix_bytes(strategy: AbstractStrategy | None, moment: Moment, shape: LayerShape) -> float:
    return dense_bytes(shape) if strategy is None else strategy.law.saved_bytes(shape, moment)


LINEAR = LayerKind(
    name="Linear",
    accepts=_runs_stock_forward(nn.Linear),
    run=_run_linear,
    sizes=lambda module: (module.in_features, module.out_features),
    shape=_matrix_shape,
    flops=_matrix_flops,
    saved_bytes=_matrix_bytes,
    least_weights=_LINEAR_LIMITS,
    variance=lambda module, strategy, moment, use, memory: _matrix_variance(
        strategy, moment, use, memory, module.weight
    ),
    cotangent_rows=lambda cotangent: cotangent.reshape(-1, cotangent.shape[-1]),
    cotangent_like=lambda rows_NO, cotangent: rows_NO.view(cotangent.shape),
)


def _is_transposed_linear(cls: type[nn.Module]) -> bool:
    """Recognise the GPT-2 style projection ``y = x W + b`` without importing the library that defines it."""
    return any(base.__name__ == "Conv1D" and base.__module__.startswith("transformers.") for base in cls.__mro__)


def _run_transposed_linear(module: Any, plan: Plan, x: Tensor) -> Tensor:
    # As one matrix, so that the very same product runs as in the stock forward.
    return linear_in_chain(x, module.weight.t(), module.bias, plan, is_flat=True)


TRANSPOSED_LINEAR = LayerKind(
    name="Conv1D",
    accepts=_is_transposed_linear,
    run=_run_transposed_linear,
    sizes=lambda module: (module.weight.shape[0], module.weight.shape[1]),
    shape=_matrix_shape,
    flops=_matrix_flops,
    saved_bytes=_matrix_bytes,
    least_weights=_LINEAR_LIMITS,
    variance=lambda module, strategy, moment, use, memory: _matrix_variance(
        strategy, moment, use, memory, module.weight.t()
    ),
    cotangent_rows=lambda cotangent: cotangent.reshape(-1, cotangent.shape[-1]),
    cotangent_like=lambda rows_NO, cotangent: rows_NO.view(cotangent.shape),
    input_name="x",
)


def _run_convolution(module: Any, plan: Plan, input: Tensor, output_size: list[int] | None = None) -> Tensor:
    config = ConvolutionConfig.from_module(module, input, output_size)
    return sketched_convolution(input, module.weight, module.bias, config, plan)


def _config_for(module: Any, x: Tensor, output: Tensor) -> ConvolutionConfig:
    """Return the module's options, with the output padding that this output's size stands for."""
    output_size = list(output.shape[-len(module.kernel_size) :]) if module.transposed else None
    return ConvolutionConfig.from_module(module, x, output_size)


def _convolution_shape(module: Any, x: Tensor, output: Tensor) -> ConvolutionShape:
    return ConvolutionShape.of(x, module.weight, _config_for(module, x, output))


def _convolution_variance(
    module: Any, strategy: AbstractStrategy, moment: Moment, use: LayerUse, memory: Any
) -> Variance:
    # Laws of convolutions are evaluated without what the layer remembers: see the documentation of `predict`.
    config = _config_for(module, use.input, use.cotangent)
    return convolution_variance(strategy, moment, use.input, module.weight.detach(), use.cotangent, config)


def _convolution_kind(stock: type[nn.Module]) -> LayerKind:
    return LayerKind(
        name=stock.__name__,
        accepts=_runs_stock_forward(stock),
        run=_run_convolution,
        sizes=lambda module: (module.in_channels, module.out_channels),
        shape=_convolution_shape,
        flops=convolution_flops,
        saved_bytes=convolution_saved_bytes,
        variance=_convolution_variance,
        cotangent_rows=as_matrix,
        cotangent_like=lambda rows_NO, cotangent: as_images(rows_NO, cotangent.shape),
        least_weights=_CONVOLUTION_LIMITS,
        slow_cotangents=(RowSample, ElementMask, RowProjection, LowRank),
    )


CONVOLUTIONS = tuple(
    _convolution_kind(stock)
    for stock in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
)


def _run_layer_norm(module: Any, plan: Plan, x: Tensor) -> Tensor:
    if len(module.normalized_shape) != 1:
        return nn.LayerNorm.forward(module, x)
    stage = LayerNormStage(module.eps, module.normalized_shape[0], plan.stored, plan.stored_memory)
    if plan.stored_memory is not None and plan.stored_memory.is_kept and current_scope() is not None:
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


def _row_wise_kind(
    stock: type[nn.Module], run: Callable[..., Tensor], new_memory: Callable[[], Any] = lambda: None
) -> LayerKind:
    return LayerKind(
        name=stock.__name__,
        accepts=_runs_stock_forward(stock),
        run=run,
        sizes=lambda module: (0, 0),
        shape=_matrix_shape,
        flops=lambda strategy, moment, shape: 0.0,
        saved_bytes=lambda strategy, moment, shape: 0.0,
        variance=lambda module, strategy, moment, use, memory: Variance(_ZERO, _ZERO),
        cotangent_rows=lambda cotangent: cotangent.reshape(-1, cotangent.shape[-1]),
        cotangent_like=lambda rows_NO, cotangent: rows_NO.view(cotangent.shape),
        least_weights={Moment.STORED: 0, Moment.COTANGENT: 0},
        row_wise=True,
        new_memory=new_memory,
    )


_ZERO = torch.zeros((), dtype=torch.float64)

ROW_WISE = (
    _row_wise_kind(nn.LayerNorm, _run_layer_norm, RootUse),
    *(
        _row_wise_kind(stock, _run_activation(_activation_of(name, options)))
        for stock, (name, options) in _ACTIVATIONS.items()
    ),
)

KINDS: tuple[LayerKind, ...] = (LINEAR, TRANSPOSED_LINEAR, *CONVOLUTIONS, *ROW_WISE)


def kind_of(cls: type[nn.Module]) -> LayerKind | None:
    """Return the kind of a module class, or None if it cannot be converted.

    >>> kind_of(nn.Linear).name
    'Linear'
    """
    return next((kind for kind in KINDS if kind.accepts(cls)), None)
