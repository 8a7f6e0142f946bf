"""Dropout, and the kind that goes with SELU."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cheapgrad.convert.kinds.element_wise import element_wise_kind, why_not_codes
from cheapgrad.convert.kinds.row_wise import row_wise_kind, why_not_row_wise
from cheapgrad.ops.chains.dropout_stage import DropoutStage
from cheapgrad.ops.chains.joining import stage_in_chain
from cheapgrad.ops.dropout import Dropping, sketched_dropout
from cheapgrad.ops.linear import may_need_grad
from cheapgrad.ops.plan import Plan
from cheapgrad.sketch import AbstractStrategy, Moment, StochasticRounding


@dataclass(frozen=True)
class DropoutShape:
    """Sizes of one use of a dropout.

    Attributes:
        shape: of the input.
        mask_bytes: bytes per entry of PyTorch's mask.
        is_drawn: whether there is a mask: a chance of 0 or 1 needs none, and neither does an input without a gradient.
    """

    shape: tuple[int, ...]
    mask_bytes: int
    is_drawn: bool


def _is_drawn(module: Any, x: Tensor) -> bool:
    return 0 < module.p < 1 and x.dim() > 0 and may_need_grad(x)


def _run_dropout(module: Any, plan: Plan, x: Tensor) -> Tensor:
    if not _is_drawn(module, x):
        return nn.Dropout.forward(module, x)
    dropping = Dropping(module.p, fused=isinstance(plan.stored, StochasticRounding) and plan.stored.fused)
    packed = dropping.draw(x)
    stage = DropoutStage(dropping, plan.stored)
    return stage_in_chain(x, stage, (packed,), plan)


def _run_alpha_dropout(module: Any, plan: Plan, x: Tensor) -> Tensor:
    if not _is_drawn(module, x):
        return nn.AlphaDropout.forward(module, x)
    dropping = Dropping(module.p, is_alpha=True)
    return sketched_dropout(x, dropping, dropping.draw(x))


def _shape(module: Any, x: Tensor, output: Tensor) -> DropoutShape:
    # In main memory PyTorch's mask is made of numbers like the input's, elsewhere of bytes.
    is_numbers = x.device.type not in ("cuda", "xpu") or isinstance(module, nn.AlphaDropout)
    return DropoutShape(tuple(x.shape), x.element_size() if is_numbers else 1, _is_drawn(module, x))


def _saved_bytes(strategy: AbstractStrategy | None, moment: Moment, shape: DropoutShape) -> float:
    if not shape.is_drawn:
        return 0.0
    if strategy is None:
        return float(math.prod(shape.shape) * shape.mask_bytes)
    return float(math.prod(shape.shape[:-1]) * -(-shape.shape[-1] // 8))


def _why_not(module: Any, strategy: AbstractStrategy, moment: Moment) -> str:
    if module.inplace:
        name = type(module).__name__
        return f"unsupported: it overwrites its input, and chains end at it; {name}(inplace=False) is reached"
    if not 0 < module.p < 1:
        return f"no mask is held for a chance of {module.p:g}"
    check = why_not_row_wise if isinstance(module, nn.Dropout) else why_not_codes
    return check(module, strategy, moment)


DROPOUTS = (
    dataclasses.replace(
        row_wise_kind(nn.Dropout, _run_dropout, shape=_shape, saved_bytes=_saved_bytes, draws_codes=False),
        why_not=_why_not,
    ),
    element_wise_kind(
        nn.AlphaDropout,
        _run_alpha_dropout,
        shape=_shape,
        saved_bytes=_saved_bytes,
        why_not=_why_not,
        draws_codes=False,
    ),
)
