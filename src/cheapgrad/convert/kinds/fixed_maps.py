"""Average pooling, and padding by reflection or replication: maps that PyTorch holds the input of for its sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cheapgrad.convert.kinds.element_wise import element_wise_kind
from cheapgrad.convert.kinds.layer_kind import LayerKind
from cheapgrad.ops.fixed_maps import FixedMap, sketched_fixed_map
from cheapgrad.ops.linear import may_need_grad
from cheapgrad.ops.plan import Plan
from cheapgrad.sketch import AbstractStrategy, Moment


@dataclass(frozen=True)
class FixedMapShape:
    """Sizes of one use of a fixed map.

    Attributes:
        stock_bytes: bytes that PyTorch holds: those of the input, if it needs a gradient.
    """

    stock_bytes: int


def _of_axes(option: Any, axes: int) -> tuple[int, ...]:
    return tuple(option) if isinstance(option, (tuple, list)) else (option,) * axes


def _average_pooling(module: Any, x: Tensor, axes: int) -> FixedMap:
    kernel, stride, padding = (_of_axes(option, axes) for option in (module.kernel_size, module.stride, module.padding))
    if axes == 1:
        kernel, stride, padding = (1, *kernel), (1, *stride), (0, *padding)
    divisor = getattr(module, "divisor_override", None)
    arguments = (kernel, stride, padding, module.ceil_mode, module.count_include_pad, divisor)
    return FixedMap(f"average pooling over {max(axes, 2)} axes", arguments, adds_axis=axes == 1)


def _adaptive_pooling(module: Any, x: Tensor, axes: int) -> FixedMap | None:
    asked = _of_axes(module.output_size, axes)
    sizes = tuple(size if wanted is None else wanted for wanted, size in zip(asked, x.shape[-axes:], strict=True))
    if all(size == 1 for size in sizes):
        # A mean, of which PyTorch holds the sizes only.
        return None
    if axes == 1:
        sizes = (1, *sizes)
    return FixedMap(f"adaptive average pooling over {max(axes, 2)} axes", (sizes,), adds_axis=axes == 1)


def _padding(kind: str) -> Callable[[Any, Tensor, int], FixedMap | None]:
    def padding(module: Any, x: Tensor, axes: int) -> FixedMap | None:
        is_indexed = kind == "replication" and (x.is_cuda or x.is_xpu) and torch.are_deterministic_algorithms_enabled()
        if is_indexed:
            # There PyTorch indexes, so that its backward pass can be a deterministic one; the kernel's would refuse.
            return None
        return FixedMap(f"{kind} padding over {axes} ax{'is' if axes == 1 else 'es'}", (tuple(module.padding),))

    return padding


def _kind_over(axes: int, stock: type[nn.Module], map_of: Callable[[Any, Tensor, int], FixedMap | None]) -> LayerKind:
    def covered(module: Any, x: Tensor) -> FixedMap | None:
        """Return the map of one call, or None where PyTorch holds nothing or says what is wrong with the input."""
        is_image = x.dim() in (axes + 1, axes + 2) and x.is_floating_point()
        return map_of(module, x, axes) if is_image and may_need_grad(x) else None

    def run(module: Any, plan: Plan, x: Tensor) -> Tensor:
        fixed_map = covered(module, x) if plan.stored is not None else None
        return stock.forward(module, x) if fixed_map is None else sketched_fixed_map(x, fixed_map)

    def shape(module: Any, x: Tensor, output: Tensor) -> FixedMapShape:
        is_held = x.requires_grad and covered(module, x) is not None
        return FixedMapShape(x.numel() * x.element_size() if is_held else 0)

    def saved_bytes(strategy: AbstractStrategy | None, moment: Moment, shape: FixedMapShape) -> float:
        return 0.0 if strategy is not None else float(shape.stock_bytes)

    return element_wise_kind(stock, run, shape=shape, saved_bytes=saved_bytes, draws_codes=False)


FIXED_MAPS = (
    *(
        _kind_over(axes, stock, _average_pooling)
        for axes, stock in enumerate((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), 1)
    ),
    *(
        _kind_over(axes, stock, _adaptive_pooling)
        for axes, stock in enumerate((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), 1)
    ),
    *(
        _kind_over(axes, stock, _padding("reflection"))
        for axes, stock in enumerate((nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d), 1)
    ),
    *(
        _kind_over(axes, stock, _padding("replication"))
        for axes, stock in enumerate((nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d), 1)
    ),
)
