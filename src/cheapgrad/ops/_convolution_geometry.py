"""Shapes of convolutions: padding resolved outside the sketched operation, and the two exact vector-Jacobian products.

A convolution and its transpose are one bilinear map seen from two sides. In both, a *sliding* tensor is read through
windows that stand at the pixels of a *centre* tensor, ``dW[c, s, z] = sum_m centre[m, c] sliding[m stride - padding +
z dilation, s]``: the cotangent is the centre of a convolution and the sliding tensor of a transposed one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cheapgrad.errors import ShapeError, UnknownNameError, nearest_match
from cheapgrad.sketch.transforms import is_transformed

_ConvolutionModule = torch.nn.modules.conv._ConvNd
_FORWARD = (functional.conv1d, functional.conv2d, functional.conv3d)
_TRANSPOSED_FORWARD = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
_PADDING_NAMES = ("same", "valid")
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Geometry:
    """A convolution whose padding is zeros, alike on both sides: what is left once other paddings are applied.

    Attributes:
        stride: one per spatial axis, as `padding`, `dilation` and `output_padding`.
        padding: zeros on either side.
        dilation: spacing of the kernel's positions.
        groups: Q.
        transposed: whether it is a transposed convolution.
        output_padding: extra length of the output of a transposed convolution.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    output_padding: tuple[int, ...]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the convolution of ``x [B, I, ...]``, as `torch.nn.functional.conv2d` and its kin compute it."""
        return torch.convolution(
            x, weight, bias, self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups
        )

    def input_gradient(self, grad: Tensor, weight: Tensor, input_shape: Sequence[int]) -> Tensor:
        """Return dX; the input itself is not needed, only its shape."""
        # The kernels pick their layout from input and weight, and the input here is a placeholder without a layout.
        weight = in_layout_of(grad, weight)
        return self._backward(grad, grad.new_empty(()).expand(input_shape), weight, (True, False, False))[0]

    def weight_gradient(self, x: Tensor, grad: Tensor, weight_shape: Sequence[int]) -> Tensor:
        """Return dW; the weight itself is not needed, only its shape."""
        return self._backward(grad, x, grad.new_empty(()).expand(weight_shape), (False, True, False))[1]

    def _backward(self, grad: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]) -> tuple[Tensor, ...]:
        return torch.ops.aten.convolution_backward(
            grad,
            x,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
            mask,
        )

    def unfold_input(self, x: Tensor, kernel: Sequence[int]) -> Tensor:
        """Return, at every output pixel, what of ``x [B, I, ...]`` meets each kernel position: ``[B, I Z, ...]``."""
        channels = x.shape[1]
        return replace(self, groups=channels).forward(x, self._one_hot_kernel(x, channels, kernel, not self.transposed))

    def unfold_cotangent(self, grad: Tensor, kernel: Sequence[int], input_shape: Sequence[int]) -> Tensor:
        """Return, at every input pixel, what of ``G [B, O, ...]`` meets each kernel position: ``[B, O Z, ...]``."""
        channels = grad.shape[1]
        shape = (grad.shape[0], channels * math.prod(kernel), *input_shape[2:])
        weight = self._one_hot_kernel(grad, channels, kernel, self.transposed)
        return replace(self, groups=channels).input_gradient(grad, weight, shape)

    def _one_hot_kernel(self, like: Tensor, channels: int, kernel: Sequence[int], many_first: bool) -> Tensor:
        positions = math.prod(kernel)
        one_hot = torch.eye(positions, dtype=like.dtype, device=like.device).repeat(channels, 1)
        leading = (channels * positions, 1) if many_first else (channels, positions)
        return one_hot.view(*leading, *kernel)

    def patch_norms_of_input(self, x: Tensor, kernel: Sequence[int]) -> Tensor:
        """Return the norms of the rows of `unfold_input`, ``[N_out]``, without unfolding."""
        # In float64 no fast kernel turns a zero into rounding noise.
        squares = pixel_squares(x).double()
        box = squares.new_ones(1, 1, *kernel)
        return replace(self, groups=1).forward(squares, box).clamp_min(0).sqrt().flatten()

    def patch_norms_of_cotangent(self, grad: Tensor, kernel: Sequence[int], input_shape: Sequence[int]) -> Tensor:
        """Return the norms of the rows of `unfold_cotangent`, ``[N_in]``, without unfolding."""
        squares = pixel_squares(grad).double()
        box = squares.new_ones(1, 1, *kernel)
        shape = (grad.shape[0], 1, *input_shape[2:])
        return replace(self, groups=1).input_gradient(squares, box, shape).clamp_min(0).sqrt().flatten()


def pixel_squares(images: Tensor) -> Tensor:
    """Return squared pixel norms ``[B, 1, ...]``, in single precision at least.

    A norm over the channels' axis would do, and is far slower on CPU.
    """
    return images.to(torch.promote_types(images.dtype, torch.float32)).square().sum(1, keepdim=True)


def in_layout_of(like: Tensor, tensor: Tensor) -> Tensor:
    """Return `tensor` channels last if `like` is, and as it is inside torch.func transforms, which hide layouts."""
    if not torch.compiler.is_compiling() and is_transformed(like):
        return tensor
    layout = _CHANNELS_LAST.get(like.dim())
    if layout is None or like.is_contiguous() or not like.is_contiguous(memory_format=layout):
        return tensor
    return tensor.contiguous(memory_format=layout)


@dataclass(frozen=True)
class ConvolutionConfig:
    """The options of a convolution module, as plain values.

    Args:
        stride: an int or one per spatial axis, as `dilation` and `output_padding`.
        padding: an int, one per spatial axis, ``"same"`` or ``"valid"``.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        dilation: spacing of the kernel's positions.
        groups: Q.
        transposed: whether it is a transposed convolution.
        output_padding: extra length of the output of a transposed convolution.

    Raises:
        UnknownNameError: if `padding` is another string.

    >>> ConvolutionConfig.from_module(torch.nn.Conv2d(3, 8, 3, padding="same")).padding
    'same'
    """

    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] | str = 0
    padding_mode: str = "zeros"
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    transposed: bool = False
    output_padding: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        if isinstance(self.padding, str) and self.padding not in _PADDING_NAMES:
            raise UnknownNameError(
                f"padding must be numbers, 'same' or 'valid', but got {self.padding!r}"
                f"{nearest_match(self.padding, _PADDING_NAMES)}"
            )

    @classmethod
    def from_module(
        cls, module: _ConvolutionModule, x: Tensor | None = None, output_size: list[int] | None = None
    ) -> ConvolutionConfig:
        """Return the options of a convolution module.

        Args:
            module: any of ``torch.nn.Conv{1,2,3}d`` and ``torch.nn.ConvTranspose{1,2,3}d``.
            x: the input of this call, needed with `output_size`.
            output_size: the optional argument of a transposed convolution's forward.
        """
        output_padding: Any = module.output_padding
        if output_size is not None and x is not None and isinstance(module, torch.nn.modules.conv._ConvTransposeNd):
            # Private, and what the stock forward calls: the checks and messages are PyTorch's own.
            compute: Any = module._output_padding
            axes = len(module.kernel_size)
            output_padding = compute(
                x, output_size, module.stride, module.padding, module.kernel_size, axes, module.dilation
            )
        return cls(
            stride=module.stride,
            padding=module.padding,
            padding_mode=module.padding_mode,
            dilation=module.dilation,
            groups=module.groups,
            transposed=module.transposed,
            output_padding=tuple(output_padding),
        )

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return exactly what the stock module returns, with PyTorch's own backward pass."""
        axes = weight.dim() - 2
        if self.transposed:
            options = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
            return _TRANSPOSED_FORWARD[axes - 1](x, weight, bias, *options)  # pyright: ignore[reportArgumentType]
        forward = _FORWARD[axes - 1]
        if self.padding_mode == "zeros":
            return forward(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)  # pyright: ignore[reportCallIssue, reportArgumentType]
        padded = functional.pad(x, _flat_padding(self._padding_sides(weight.shape[2:])), mode=self.padding_mode)
        return forward(padded, weight, bias, self.stride, 0, self.dilation, self.groups)  # pyright: ignore[reportCallIssue]

    def resolve(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Geometry]:
        """Return the input with every padding applied that is not zeros on both sides, and what is left to do.

        Args:
            x: shape ``[B, I, ...]``.
            weight: of the module's shape.

        Raises:
            ShapeError: for ``padding="same"`` with a stride.
        """
        axes = weight.dim() - 2
        sides = self._padding_sides(weight.shape[2:])
        padding = tuple(low for low, _ in sides)
        if self.padding_mode != "zeros":
            x = functional.pad(x, _flat_padding(sides), mode=self.padding_mode)
            padding = (0,) * axes
        elif any(high > low for low, high in sides):
            # As PyTorch does for an odd total: the difference is appended, the rest is even.
            x = functional.pad(x, _flat_padding([(0, high - low) for low, high in sides]))
        return x, Geometry(
            stride=as_tuple(self.stride, axes),
            padding=padding,
            dilation=as_tuple(self.dilation, axes),
            groups=self.groups,
            transposed=self.transposed,
            output_padding=as_tuple(self.output_padding, axes),
        )

    def _padding_sides(self, kernel: Sequence[int]) -> list[tuple[int, int]]:
        """Return padding before and after, per spatial axis."""
        axes = len(kernel)
        if self.padding == "valid":
            return [(0, 0)] * axes
        if not isinstance(self.padding, str):
            return [(size, size) for size in as_tuple(self.padding, axes)]
        if any(step != 1 for step in as_tuple(self.stride, axes)):
            raise ShapeError(
                f"padding='same' needs stride 1, but got stride={self.stride}; give the padding in numbers"
            )
        totals = [step * (size - 1) for step, size in zip(as_tuple(self.dilation, axes), kernel, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]


def as_tuple(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """Return one value per spatial axis.

    >>> as_tuple(2, 3)
    (2, 2, 2)
    """
    if isinstance(value, int):
        return (value,) * axes
    return tuple(value) * axes if len(value) == 1 else tuple(value)


def _flat_padding(sides: Sequence[tuple[int, int]]) -> list[int]:
    """Return paddings as `torch.nn.functional.pad` takes them: last axis first."""
    return [size for pair in reversed(sides) for size in pair]


def as_matrix(images: Tensor) -> Tensor:
    """Return images ``[B, D, ...]`` as a matrix ``[N, D]`` whose rows are (example, pixel)."""
    return images.movedim(1, -1).reshape(-1, images.shape[1])


def as_images(matrix_ND: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a matrix as images ``[B, D, ...]``, with batch and pixels as in `shape` (a view, channels last)."""
    rows, channels = matrix_ND.shape
    return matrix_ND.reshape(rows // math.prod(shape[2:]), *shape[2:], channels).movedim(-1, 1)


def gather_pixels(images: Tensor, index_K: Tensor) -> Tensor:
    """Return the given rows of `as_matrix`, shape ``[K, D]``, without forming it."""
    flat = images.flatten(2)
    return flat[index_K // flat.shape[2], :, index_K % flat.shape[2]]


def gather_patches(
    sliding: Tensor, geometry: Geometry, kernel: Sequence[int], centre_size: Sequence[int], index_K: Tensor
) -> Tensor:
    """Return the windows of ``sliding [B, D, ...]`` that stand at the given centre pixels, shape ``[K, Z, D]``."""
    sides = [(size, size) for size in geometry.padding]
    # Padding first, in the tensor's own layout: the copy to channels last is then fast for powers of 2 as well.
    padded = functional.pad(sliding, _flat_padding(sides)).movedim(1, -1)
    row_K, offset_Z = torch.zeros_like(index_K), index_K.new_zeros(1)
    rest_K, row_stride = index_K, 1
    for axis in reversed(range(len(kernel))):
        row_K = row_K + (rest_K % centre_size[axis]) * (geometry.stride[axis] * row_stride)
        steps = torch.arange(kernel[axis], device=index_K.device) * (geometry.dilation[axis] * row_stride)
        offset_Z = (steps.unsqueeze(1) + offset_Z).flatten()
        rest_K = rest_K // centre_size[axis]
        row_stride *= padded.shape[1 + axis]
    row_K = row_K + rest_K * row_stride
    rows = (row_K.unsqueeze(1) + offset_Z).flatten()
    return (
        padded.reshape(-1, sliding.shape[1])
        .index_select(0, rows)
        .view(index_K.shape[0], offset_Z.shape[0], sliding.shape[1])
    )
