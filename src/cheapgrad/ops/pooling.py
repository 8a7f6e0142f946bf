"""Max-pooling that holds, for each output, which place of its window it was taken from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.ops._guards import differentiate_once, refuse_forward_mode

_NAME = "max-pooling"


@dataclass(frozen=True)
class MaxPooling:
    """Options of a max-pooling over one to three axes, a number for each axis.

    Attributes:
        kernel: window sizes.
        stride: steps between windows.
        padding: places of minus infinity at both ends.
        dilation: steps within a window.
        ceil_mode: whether a window that reaches beyond the end counts.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool = False

    @property
    def offset_dtype(self) -> torch.dtype:
        """The smallest integers that count the places of a window."""
        places = math.prod(self.kernel)
        return torch.uint8 if places <= 256 else torch.int16 if places <= 1 << 15 else torch.int32

    def _arguments(self) -> tuple[Any, ...]:
        return list(self.kernel), list(self.stride), list(self.padding), list(self.dilation), self.ceil_mode

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maxima, bit for bit as PyTorch does, and the place in its window of each of them."""
        if len(self.kernel) == 1:
            output, place = self._over_two_axes().forward(x.unsqueeze(-2))
            return output.squeeze(-2), place.squeeze(-2)
        aten = torch.ops.aten
        pool = aten.max_pool2d_with_indices if len(self.kernel) == 2 else aten.max_pool3d_with_indices
        output, index = pool(x, *self._arguments())
        offset = torch.zeros((), dtype=index.dtype, device=index.device)
        for axis, (coordinate, first) in enumerate(self._places(index, x.shape)):
            place = (coordinate - first) if self.dilation[axis] == 1 else (coordinate - first) // self.dilation[axis]
            offset = offset * self.kernel[axis] + place
        return output, offset.to(self.offset_dtype)

    def backward(self, grad: Tensor, offset: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the cotangent of the input, bit for bit as PyTorch does.

        Args:
            grad: cotangent of the output.
            offset: what `forward` returned.
            shape: of the input.
        """
        if len(self.kernel) == 1:
            wide = (*shape[:-1], 1, shape[-1])
            return self._over_two_axes().backward(grad.unsqueeze(-2), offset.unsqueeze(-2), wide).squeeze(-2)
        axes = len(self.kernel)
        index = torch.zeros((), dtype=torch.int64, device=grad.device)
        rest = offset.long()
        scale = 1
        for axis in reversed(range(axes)):
            place, rest = (rest % self.kernel[axis], rest // self.kernel[axis]) if axis else (rest, rest)
            coordinate = (
                self._first(axis, offset.shape[axis - axes], grad.device).view(-1, *[1] * (axes - 1 - axis))
                + place * self.dilation[axis]
            )
            index = index + coordinate * scale
            scale *= shape[axis - axes]
        aten = torch.ops.aten
        spread = aten.max_pool2d_with_indices_backward if axes == 2 else aten.max_pool3d_with_indices_backward
        # Of the input only the sizes are read.
        return spread(grad, grad.new_empty(shape), *self._arguments(), index)

    def _places(self, index: Tensor, shape: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        """Return for each axis where in the input the maxima are, and where their windows begin."""
        axes = len(self.kernel)
        places, rest = [], index
        for axis in reversed(range(axes)):
            size = shape[axis - axes]
            coordinate, rest = (rest % size, rest // size) if axis else (rest, rest)
            first = self._first(axis, index.shape[axis - axes], index.device)
            places.insert(0, (coordinate, first.view(-1, *[1] * (axes - 1 - axis))))
        return places

    def _first(self, axis: int, outputs: int, device: torch.device) -> Tensor:
        return torch.arange(outputs, device=device) * self.stride[axis] - self.padding[axis]

    def _over_two_axes(self) -> MaxPooling:
        return MaxPooling((1, *self.kernel), (1, *self.stride), (0, *self.padding), (1, *self.dilation), self.ceil_mode)


class _SketchedMaxPooling(torch.autograd.Function):
    """Forward is PyTorch's; it returns the offsets beside the output, so that the output is computed once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, tie: Tensor | None, pooling: MaxPooling) -> tuple[Tensor, Tensor]:
        return pooling.forward(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, tie, ctx.pooling = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(tie, output[1])
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *ignored: Tensor | None) -> tuple[Tensor | None, ...]:
        tie, offset = ctx.saved_tensors
        with torch.no_grad():
            result = ctx.pooling.backward(grad, offset, ctx.shape)
        return differentiate_once(result, _NAME, grad, tie), None, None


class _EagerSketchedMaxPooling(_SketchedMaxPooling):
    """The same, refusing forward mode by name; compiled graphs take no Function that defines a jvp."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        refuse_forward_mode(_NAME)


def sketched_max_pooling(x: Tensor, pooling: MaxPooling) -> Tensor:
    """Return the maxima of windows, bit for bit as PyTorch does, holding a small integer per output for backward.

    PyTorch holds the input and an index of eight bytes per output. The index is made again from the offset, and
    PyTorch's own kernel adds up the cotangents: the gradient is exact, bit for bit.

    Args:
        x: ``[B, C, ...]`` or ``[C, ...]`` with as many axes behind as the pooling has, floating point.
        pooling: its options.

    **Law** The gradient is exact. Held: a byte per output where windows have at most 256 places.

    Raises:
        SecondDerivativeError: when a gradient through it is differentiated again.
        ForwardModeError: in forward-mode differentiation.

    >>> sketched_max_pooling(torch.arange(6.0).view(1, 6), MaxPooling((2,), (2,), (0,), (1,)))
    tensor([[1., 3., 5.]])
    """
    if torch.compiler.is_compiling():
        return _SketchedMaxPooling.apply(x, None, pooling)[0]
    # No bytes, but a child of x: stands for it where a second derivative is refused, so that x itself is not held.
    return _EagerSketchedMaxPooling.apply(x, x.reshape(-1)[:0].clone(), pooling)[0]
