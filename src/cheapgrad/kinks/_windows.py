"""Which entries each output of a pooling looks at, whatever its kind and number of axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# What stands for an entry in the padding.
PADDING = -1

_POOLS: dict[int, Callable[..., Any]] = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_ADAPTIVE_POOLS: dict[int, Callable[..., Any]] = {
    1: functional.adaptive_max_pool1d,
    2: functional.adaptive_max_pool2d,
    3: functional.adaptive_max_pool3d,
}


class PoolWindows:
    """The windows of a pooling: where they lie and how to get at their entries.

    Attributes:
        pooled: what torch's own pooling returns, detached; it decides shapes, and refuses what it always refuses.
        index_PZ: for each of the P outputs of an image the flat positions of its Z entries, row by row, `PADDING` where
            there is none.
    """

    def __init__(self, pooled: Tensor, axes: Sequence[Tensor], sizes: Sequence[int]) -> None:
        self.pooled = pooled
        self.spatial = len(sizes)
        index_PZ = axes[0]
        for axis, size in zip(axes[1:], sizes[1:], strict=True):
            joined = index_PZ[:, None, :, None] * size + axis[None, :, None, :]
            inside = (index_PZ[:, None, :, None] != PADDING) & (axis[None, :, None, :] != PADDING)
            joined = torch.where(inside, joined, PADDING)
            index_PZ = joined.flatten(2).flatten(0, 1)
        self.index_PZ = index_PZ.to(pooled.device)

    def flatten(self, image: Tensor) -> Tensor:
        """Return the image with its spatial axes joined into one."""
        return image.flatten(-self.spatial)

    def entries(self, image: Tensor, padding: float) -> Tensor:
        """Return ``[..., P, Z]``: the entries of every window, `padding` where it reaches over the edge."""
        entries = self.flatten(image)[..., self.index_PZ.clamp(min=0)]
        return entries.masked_fill(self.index_PZ == PADDING, padding)

    def positions(self, chosen: Tensor) -> Tensor:
        """Return the flat positions ``[..., P]`` of the entry chosen in every window."""
        shape = (*chosen.shape, self.index_PZ.shape[-1])
        return self.index_PZ.expand(shape).gather(-1, chosen.unsqueeze(-1)).squeeze(-1)

    def pick(self, image: Tensor, positions: Tensor) -> Tensor:
        """Return the entries at flat `positions`, in the shape of the pooled image."""
        return self.flatten(image).gather(-1, positions).view(self.pooled.shape)


def pool_windows(
    image: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    *,
    spatial: int,
) -> PoolWindows:
    """Return the windows of a max-pooling over the last `spatial` axes, arguments as in torch."""
    pooled = _POOLS[spatial](image.detach(), kernel_size, stride or None, padding, dilation, ceil_mode)
    kernels = _spread(kernel_size, spatial)
    strides = _spread(stride, spatial) if stride else kernels
    paddings, dilations = _spread(padding, spatial), _spread(dilation, spatial)
    sizes = image.shape[-spatial:]
    axes = []
    for axis, (size, outputs) in enumerate(zip(sizes, pooled.shape[-spatial:], strict=True)):
        starts = torch.arange(outputs) * strides[axis] - paddings[axis]
        places = starts[:, None] + torch.arange(kernels[axis]) * dilations[axis]
        axes.append(torch.where((places >= 0) & (places < size), places, PADDING))
    return PoolWindows(pooled, axes, sizes)


def adaptive_windows(image: Tensor, output_size: int | Sequence[int | None], *, spatial: int) -> PoolWindows:
    """Return the windows of an adaptive max-pooling over the last `spatial` axes; they may differ in size."""
    pooled = _ADAPTIVE_POOLS[spatial](image.detach(), output_size)
    sizes = image.shape[-spatial:]
    axes = []
    for size, outputs in zip(sizes, pooled.shape[-spatial:], strict=True):
        place = torch.arange(outputs)
        starts, ends = place * size // outputs, -(-(place + 1) * size // outputs)
        places = starts[:, None] + torch.arange(int((ends - starts).max()))
        axes.append(torch.where(places < ends[:, None], places, PADDING))
    return PoolWindows(pooled, axes, sizes)


def _spread(value: int | Sequence[int], count: int) -> list[int]:
    """Return one number for each axis; torch takes one for all of them."""
    if isinstance(value, int):
        return [value] * count
    return [*value] * count if len(value) == 1 else [*value]
