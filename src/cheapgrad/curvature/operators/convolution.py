"""Convolutions whose second derivatives run on the kernels of the first ones.

PyTorch differentiates the backward pass of a convolution by forward convolutions of transposed tensors, group by group;
the same products by the kernels made for them take about seven eighths of the time of a Hessian product.

With Y = X ∗ W and G the cotangent of Y, backward is ``dX = G ∗ᵀ W`` and ``dW = X ⋆ G``. Both are bilinear, so for the
cotangents A of dX and B of dW the next pass is: of G, ``A ∗ W + X ∗ B``; of X, ``G ∗ᵀ B``; of W, ``A ⋆ G``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_DIMENSIONS: dict[Callable[..., Any], int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
# Stride, padding, dilation, transposed, output padding, groups, as `aten::convolution` takes them.
_Geometry = tuple[list[int], list[int], list[int], bool, list[int], int]


class NativeConvolutions(TorchFunctionMode):
    """Inside of it, convolutions are differentiated twice by native kernels; forward-mode differentiation is not."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run a convolution of this room's in place of PyTorch's, where it covers the call."""
        kwargs = kwargs or {}
        dimensions = _DIMENSIONS.get(func)
        if dimensions is None:
            return func(*args, **kwargs)
        return _convolve(func, dimensions, *args, **kwargs)


def _convolve(
    stock: Callable[..., Tensor],
    dimensions: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    is_batched = input.ndim == dimensions + 2
    if isinstance(padding, str) or not is_batched or torch.is_autocast_enabled(input.device.type):
        return stock(input, weight, bias, stride, padding, dilation, groups)
    strides, paddings, dilations = (_spread(value, dimensions) for value in (stride, padding, dilation))
    geometry: _Geometry = (strides, paddings, dilations, False, [0] * dimensions, groups)
    return _Convolution.apply(input, weight, bias, geometry)


def _spread(value: Any, dimensions: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dimensions if len(values) == 1 else values


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return torch.ops.aten.convolution(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        return *_ConvolutionBackward.apply(grad, x, weight, ctx.geometry, list(ctx.needs_input_grad[:3])), None


class _ConvolutionBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry, wanted: list[bool]) -> Any:
        ctx.save_for_backward(grad, x, weight)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        sizes = [weight.shape[0]] if wanted[2] else None
        return torch.ops.aten.convolution_backward(grad, x, weight, sizes, *geometry, wanted)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_x: Tensor | None, of_weight: Tensor | None, of_bias: Tensor | None) -> tuple[Any, ...]:
        grad, x, weight = ctx.saved_tensors
        aten = torch.ops.aten
        wants_grad, wants_x, wants_weight, _, _ = ctx.needs_input_grad
        along_grad = along_x = along_weight = None
        if wants_grad:
            parts = []
            if of_x is not None:
                parts.append(aten.convolution(of_x, weight, None, *ctx.geometry))
            if of_weight is not None:
                parts.append(aten.convolution(x, of_weight, None, *ctx.geometry))
            if of_bias is not None:
                parts.append(of_bias.reshape(1, -1, *[1] * (grad.ndim - 2)).expand_as(grad))
            along_grad = sum(parts[1:], parts[0]) if parts else None
        if wants_x and of_weight is not None:
            along_x = aten.convolution_backward(grad, x, of_weight, None, *ctx.geometry, [True, False, False])[0]
        if wants_weight and of_x is not None:
            along_weight = aten.convolution_backward(grad, of_x, weight, None, *ctx.geometry, [False, True, False])[1]
        return along_grad, along_x, along_weight, None, None
