"""Does the loss change with the order of a batch's entries? Then they are no examples of a mini-batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from cheapgrad.auditing._examples import reverse_examples
from cheapgrad.auditing._forward_noise import same_number
from cheapgrad.auditing._step import Step
from cheapgrad.errors import BatchOrderError

# By how much the loss may change with the order of examples: sums are rounded in another order.
_SAME_LOSS_ULPS = 4096


def check_order(
    step: Step, batch: Any, examples: int, loss: float | None, make_seed: Callable[[str], int]
) -> tuple[str, ...]:
    """Refuse a batch whose loss is another in reverse order; return a remark where that cannot be told.

    Where the loss of the exact gradient is unknown, or draws random numbers by position, the loss function itself is
    compared in evaluation mode: dropout does not tell examples apart there.

    Args:
        step: whose loss is compared.
        batch: the batch.
        examples: how many entries its first axis has.
        loss: of the exact gradient from the seed "whole"; None if unknown, or if the forward pass draws.
        make_seed: a seed for each text.

    Raises:
        BatchOrderError: the two losses differ.
    """
    reverse, where = reverse_examples(batch, examples), ""
    if loss is not None:
        other = step.draw_exact(reverse, make_seed("whole")).loss
    else:
        where = " in evaluation mode"
        try:
            loss, again = (step.evaluate(batch, make_seed(text)) for text in ("whole", "another"))
            other = step.evaluate(reverse, make_seed("whole"))
        except Exception as error:
            # Some models return something else in evaluation mode; whatever the reason, the audit itself goes on.
            return _remark(f"in evaluation mode the loss function raised {type(error).__name__}: {error}")
        if not math.isfinite(loss):
            return _remark(f"in evaluation mode the loss is {loss:.9g}")
        if not same_number(loss, again, _dtype(step)):
            return _remark("it draws random numbers in evaluation mode too")
    slack = _SAME_LOSS_ULPS * torch.finfo(_dtype(step)).eps * max(abs(loss), 1e-3)
    if other is not None and not abs(loss - other) <= slack:
        raise BatchOrderError(
            f"the loss{where} is {loss:.9g}, and {other:.9g} with the batch's {examples} entries of the first axis in "
            "reverse order, so these are no examples that a mini-batch could be cut into; pass split=False to leave "
            "out the mini-batch's variance"
        )
    return ()


def _dtype(step: Step) -> torch.dtype:
    return step.parameters[0].dtype


def _remark(reason: str) -> tuple[str, ...]:
    return (f"nobody checked whether the order of the batch's examples changes its loss: {reason}",)
