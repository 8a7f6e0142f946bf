"""Convolutions of one to three axes and their transposes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cheapgrad.convert.kinds.layer_kind import LayerKind, LayerUse, runs_stock_forward
from cheapgrad.convert.kinds.products import why_not_product
from cheapgrad.ops._convolution_geometry import as_images, as_matrix
from cheapgrad.ops.convolution import ConvolutionConfig, sketched_convolution
from cheapgrad.ops.convolution_law import (
    ConvolutionShape,
    convolution_flops,
    convolution_saved_bytes,
    convolution_variance,
)
from cheapgrad.ops.plan import Plan
from cheapgrad.sketch import AbstractStrategy, ElementMask, LowRank, Moment, RowProjection, RowSample, Variance

# A convolution uses every weight at many pixels: few weights are enough for a draw to pay.
_CONVOLUTION_LIMITS = {Moment.STORED: 0, Moment.COTANGENT: 1024}


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
        accepts=runs_stock_forward(stock),
        run=_run_convolution,
        sizes=lambda module: (module.in_channels, module.out_channels),
        shape=_convolution_shape,
        flops=convolution_flops,
        saved_bytes=convolution_saved_bytes,
        variance=_convolution_variance,
        cotangent_rows=as_matrix,
        cotangent_like=lambda rows_NO, cotangent: as_images(rows_NO, cotangent.shape),
        why_not=why_not_product,
        least_weights=_CONVOLUTION_LIMITS,
        slow_cotangents=(RowSample, ElementMask, RowProjection, LowRank),
    )


CONVOLUTIONS = tuple(
    _convolution_kind(stock)
    for stock in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
)
