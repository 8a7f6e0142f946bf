"""PReLU, the activation with slopes that are learnt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cheapgrad.convert.kinds.element_wise import element_wise_kind
from cheapgrad.convert.kinds.layer_kind import LayerUse
from cheapgrad.ops.linear import may_need_grad
from cheapgrad.ops.plan import Plan
from cheapgrad.ops.prelu import prelu_saved_bytes, prelu_variance, sketched_prelu
from cheapgrad.sketch import AbstractStrategy, Moment, StochasticRounding, Variance


@dataclass(frozen=True)
class PReluShape:
    """Sizes of one use of a PReLU.

    Attributes:
        shape: of the input.
        element_bytes: bytes per entry of the input.
        wants_weight: whether the slopes need a gradient.
    """

    shape: tuple[int, ...]
    element_bytes: int
    wants_weight: bool


def _run(module: Any, plan: Plan, x: Tensor) -> Tensor:
    is_needed = may_need_grad(x) or may_need_grad(module.weight)
    if not isinstance(plan.stored, StochasticRounding) or not is_needed or not x.dim():
        return nn.PReLU.forward(module, x)
    return sketched_prelu(x, module.weight, plan.stored)


def _saved_bytes(strategy: AbstractStrategy | None, moment: Moment, shape: PReluShape) -> float:
    if isinstance(strategy, StochasticRounding):
        return prelu_saved_bytes(shape.shape, strategy, shape.wants_weight)
    return float(math.prod(shape.shape) * shape.element_bytes)


def _variance(module: Any, strategy: AbstractStrategy, moment: Moment, use: LayerUse, memory: Any) -> Variance:
    if not isinstance(strategy, StochasticRounding):
        raise TypeError(f"a PReLU holds codes of StochasticRounding, not of {strategy!r}")
    return prelu_variance(use.input, module.weight, use.cotangent, strategy)


PRELU = element_wise_kind(
    nn.PReLU,
    _run,
    shape=lambda module, x, output: PReluShape(tuple(x.shape), x.element_size(), module.weight.requires_grad),
    saved_bytes=_saved_bytes,
    variance=_variance,
)
