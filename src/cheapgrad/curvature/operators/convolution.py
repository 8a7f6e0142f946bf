"""Convolutions whose second derivatives run on the kernels of the first ones.

PyTorch differentiates the backward pass of a convolution by forward convolutions of transposed tensors, group by group;
the kernels made for them do the same, and take about seven eighths of the time of a Hessian product.

With Y = X ∗ W and G the cotangent of Y, backward is ``dX = G ∗ᵀ W`` and ``dW = X ⋆ G``. Both are bilinear, so for the
cotangents A of dX and B of dW the next pass is: of G, ``A ∗ W + X ∗ B``; of X, ``G ∗ᵀ B``; of W, ``A ⋆ G``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FORWARD: dict[Callable[..., Any], int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_TRANSPOSED: dict[Callable[..., Any], int] = {
    torch.conv_transpose1d: 1,
    torch.conv_transpose2d: 2,
    torch.conv_transpose3d: 3,
}
# Stride, padding, dilation, transposed, output padding, groups, as `aten::convolution` takes them.
_Geometry = tuple[list[int], list[int], list[int], bool, list[int], int]


class NativeConvolutions(TorchFunctionMode):
    """Inside of it, convolutions are differentiated twice by native kernels; forward-mode differentiation is not."""

    def __init__(self) -> None:
        super().__init__()
        self.starts_from_zeros = False

    @contextlib.contextmanager
    def from_zeros(self) -> Iterator[None]:
        """Run a backward pass that starts from zeros and is only wanted as a linear function of them.

        Its values, which are zero, and its derivatives by inputs and weights are then not computed.
        """
        self.starts_from_zeros = True
        try:
            yield
        finally:
            self.starts_from_zeros = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run a convolution of this room's in place of PyTorch's, where it covers the call."""
        kwargs = kwargs or {}
        if func in _FORWARD:
            return _convolve(func, self, *args, **kwargs)
        if func in _TRANSPOSED:
            return _convolve_transposed(func, self, *args, **kwargs)
        return func(*args, **kwargs)


def _convolve(
    stock: Callable[..., Tensor],
    mode: NativeConvolutions,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    dimensions = _FORWARD[stock]
    strides, dilations = _spread(stride, dimensions), _spread(dilation, dimensions)
    paddings = _read_padding(padding, weight, dilations)
    if paddings is None or not _is_covered(input, dimensions):
        return stock(input, weight, bias, stride, padding, dilation, groups)
    geometry: _Geometry = (strides, paddings, dilations, False, [0] * dimensions, groups)
    return _Convolution.apply(input, weight, bias, geometry, mode)


def _convolve_transposed(
    stock: Callable[..., Tensor],
    mode: NativeConvolutions,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    dimensions = _TRANSPOSED[stock]
    if not _is_covered(input, dimensions):
        return stock(input, weight, bias, stride, padding, output_padding, groups, dilation)
    strides, paddings, dilations, added = (
        _spread(value, dimensions) for value in (stride, padding, dilation, output_padding)
    )
    geometry: _Geometry = (strides, paddings, dilations, True, added, groups)
    return _Convolution.apply(input, weight, bias, geometry, mode)


def _is_covered(input: Tensor, dimensions: int) -> bool:
    return input.ndim == dimensions + 2 and not torch.is_autocast_enabled(input.device.type)


def _spread(value: Any, dimensions: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dimensions if len(values) == 1 else values


def _read_padding(padding: Any, weight: Tensor, dilations: list[int]) -> list[int] | None:
    """Return the padding of each axis, or None where it is not the same on both sides."""
    if not isinstance(padding, str):
        return _spread(padding, len(dilations))
    if padding == "valid":
        return [0] * len(dilations)
    totals = [dilation * (size - 1) for dilation, size in zip(dilations, weight.shape[2:], strict=True)]
    return None if any(total % 2 for total in totals) else [total // 2 for total in totals]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry, mode: NativeConvolutions
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.mode = geometry, mode
        return torch.ops.aten.convolution(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        is_zero = ctx.mode.starts_from_zeros
        if is_zero:
            x, weight = x.detach(), weight.detach()
        wanted = list(ctx.needs_input_grad[:3])
        return *_ConvolutionBackward.apply(grad, x, weight, ctx.geometry, wanted, is_zero), None, None


class _ConvolutionBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry, wanted: list[bool], is_zero: bool
    ) -> Any:
        ctx.save_for_backward(grad, x, weight)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        channels = grad.shape[1]
        if is_zero:
            shapes = (x.shape, weight.shape, (channels,))
            return tuple(
                grad.new_zeros(()).expand(shape) if want else None for shape, want in zip(shapes, wanted, strict=True)
            )
        sizes = [channels] if wanted[2] else None
        return torch.ops.aten.convolution_backward(grad, x, weight, sizes, *geometry, wanted)

    @staticmethod
    def backward(ctx: Any, of_x: Tensor | None, of_weight: Tensor | None, of_bias: Tensor | None) -> tuple[Any, ...]:
        grad, x, weight = ctx.saved_tensors
        aten = torch.ops.aten
        wants_grad, wants_x, wants_weight, *_ = ctx.needs_input_grad
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
        return along_grad, along_x, along_weight, None, None, None
