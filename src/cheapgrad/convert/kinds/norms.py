"""Norms over images: batch, group and instance norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cheapgrad.convert.kinds.element_wise import element_wise_kind
from cheapgrad.convert.kinds.layer_kind import LayerUse
from cheapgrad.ops.linear import may_need_grad
from cheapgrad.ops.norms import Normalisation, norm_saved_bytes, norm_variance, sketched_norm
from cheapgrad.ops.plan import Plan
from cheapgrad.sketch import AbstractStrategy, Moment, StochasticRounding, Variance

_Statistics = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class NormShape:
    """Sizes of one use of a norm.

    Attributes:
        image: shape ``[B, C, ...]``.
        norm: what is normalised together.
        wants_input: whether the input needs a gradient.
        element_bytes: bytes per element of the input.
        statistic_bytes: bytes per statistic that PyTorch holds.
        repeated_bytes: bytes that PyTorch holds besides the input and two statistics for each mean.
    """

    image: tuple[int, ...]
    norm: Normalisation
    wants_input: bool
    element_bytes: int
    statistic_bytes: int
    repeated_bytes: int = 0


def _as_image(module: Any, x: Tensor) -> Tensor:
    """Return the input with an axis of examples, which an instance norm may do without."""
    is_single = isinstance(module, nn.modules.instancenorm._InstanceNorm) and x.dim() == module._get_no_batch_dim()
    return x.unsqueeze(0) if is_single else x


def _normalisation(module: Any, image: Tensor) -> Normalisation:
    if isinstance(module, nn.GroupNorm):
        return Normalisation(module.num_groups, module.eps)
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return Normalisation(image.shape[1], module.eps)
    return Normalisation(None, module.eps)


def _batch_norm(module: Any, x: Tensor) -> _Statistics:
    """Return what a batch norm in training does, with the statistics it computes on the way."""
    momentum = module.momentum or 0.0
    tracks = module.track_running_stats
    if tracks and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:
            momentum = 1.0 / float(module.num_batches_tracked)
    running = (module.running_mean, module.running_var) if tracks else (None, None)
    uses_cudnn = torch.backends.cudnn.enabled
    output, mean, rstd, *_ = torch._batch_norm_impl_index(
        x, module.weight, module.bias, *running, True, momentum, module.eps, uses_cudnn
    )
    return output, mean, rstd


def _run(stock_class: Any) -> Callable[..., Tensor]:
    is_batch_norm = issubclass(stock_class, nn.modules.batchnorm._BatchNorm)

    def run(module: Any, plan: Plan, x: Tensor) -> Tensor:
        needed = [tensor for tensor in (x, module.weight, module.bias) if tensor is not None]
        codec, image = plan.stored, _as_image(module, x)
        if not isinstance(codec, StochasticRounding) or not any(map(may_need_grad, needed)) or image.dim() < 2:
            return stock_class.forward(module, x)
        if is_batch_norm:
            module._check_input_dim(x)
            nn.functional._verify_batch_size(list(x.shape))  # type: ignore[attr-defined] - what the stock forward asks

        def stock(value: Tensor) -> _Statistics:
            return _batch_norm(module, value) if is_batch_norm else (stock_class.forward(module, value), None, None)

        norm = _normalisation(module, image)
        output = sketched_norm(image, module.weight, module.bias, norm, codec, stock)
        return output if image is x else output.squeeze(0)

    return run


def _shape(module: Any, x: Tensor, output: Tensor) -> NormShape:
    image = _as_image(module, x)
    repeated = 0
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        # Weight and running statistics, once for each example.
        held = [tensor for tensor in (module.weight, module.running_mean, module.running_var) if tensor is not None]
        repeated = len(held) * math.prod(image.shape[:2]) * x.element_size()
    statistic_bytes = (x if module.weight is None else module.weight).element_size()
    norm = _normalisation(module, image)
    return NormShape(tuple(image.shape), norm, x.requires_grad, x.element_size(), statistic_bytes, repeated)


def _saved_bytes(strategy: AbstractStrategy | None, moment: Moment, shape: NormShape) -> float:
    if isinstance(strategy, StochasticRounding):
        # Statistics are held in single precision at least.
        return norm_saved_bytes(shape.image, shape.norm, strategy, shape.wants_input, max(shape.element_bytes, 4))
    statistics = 2 * shape.norm.count_means(shape.image) * shape.statistic_bytes
    return float(math.prod(shape.image) * shape.element_bytes + statistics + shape.repeated_bytes)


def _variance(module: Any, strategy: AbstractStrategy, moment: Moment, use: LayerUse, memory: Any) -> Variance:
    if not isinstance(strategy, StochasticRounding):
        raise TypeError(f"a norm holds codes of StochasticRounding, not of {strategy!r}")
    image = _as_image(module, use.input)
    variance = norm_variance(
        image, module.weight, use.cotangent.view(image.shape), _normalisation(module, image), strategy
    )
    return variance if use.wants_input else Variance(torch.zeros_like(variance.input), variance.weight)


NORMS = tuple(
    element_wise_kind(stock, _run(stock), shape=_shape, saved_bytes=_saved_bytes, variance=_variance)
    for stock in (
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
        nn.GroupNorm,
        nn.InstanceNorm1d,
        nn.InstanceNorm2d,
        nn.InstanceNorm3d,
    )
)
