"""Max-pooling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cheapgrad.convert.kinds.element_wise import element_wise_kind, why_not_codes
from cheapgrad.ops.linear import may_need_grad
from cheapgrad.ops.plan import Plan
from cheapgrad.ops.pooling import MaxPooling, sketched_max_pooling
from cheapgrad.sketch import AbstractStrategy, Moment

_INDEX_BYTES = 8


@dataclass(frozen=True)
class PoolingShape:
    """Sizes of one use of a max-pooling.

    Attributes:
        input_bytes: bytes of the input.
        outputs: entries of the output.
        offset_bytes: bytes of an offset inside the window.
        wants_input: whether the input needs a gradient.
    """

    input_bytes: int
    outputs: int
    offset_bytes: int
    wants_input: bool


def _pooling_of(module: Any, axes: int) -> MaxPooling:
    def of_axes(option: Any) -> tuple[int, ...]:
        return tuple(option) if isinstance(option, (tuple, list)) else (option,) * axes

    return MaxPooling(
        of_axes(module.kernel_size),
        of_axes(module.stride),
        of_axes(module.padding),
        of_axes(module.dilation),
        module.ceil_mode,
    )


def _why_not(module: Any, strategy: AbstractStrategy, moment: Moment) -> str:
    if module.return_indices:
        return "unsupported: the indices that it returns are held anyway (return_indices=True)"
    return why_not_codes(module, strategy, moment)


def _kind_over(axes: int, stock: Any) -> Any:
    def run(module: Any, plan: Plan, x: Tensor) -> Tensor:
        if plan.stored is None or not may_need_grad(x) or x.dim() not in (axes + 1, axes + 2):
            return stock.forward(module, x)
        return sketched_max_pooling(x, _pooling_of(module, axes))

    def shape(module: Any, x: Tensor, output: Tensor) -> PoolingShape:
        offset_bytes = _pooling_of(module, axes).offset_dtype.itemsize
        return PoolingShape(x.numel() * x.element_size(), output.numel(), offset_bytes, x.requires_grad)

    def saved_bytes(strategy: AbstractStrategy | None, moment: Moment, shape: PoolingShape) -> float:
        if not shape.wants_input:
            return 0.0
        if strategy is None:
            return float(shape.input_bytes + shape.outputs * _INDEX_BYTES)
        return float(shape.outputs * shape.offset_bytes)

    return element_wise_kind(stock, run, shape=shape, saved_bytes=saved_bytes, why_not=_why_not, draws_codes=False)


POOLINGS = tuple(_kind_over(axes, stock) for axes, stock in enumerate((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), 1))
