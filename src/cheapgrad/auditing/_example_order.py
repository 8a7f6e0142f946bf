"""Do loss or gradient change with the order of a batch's entries? Then they are no examples of a mini-batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cheapgrad.auditing._errors_drawn import inner_product
from cheapgrad.auditing._examples import reverse_examples
from cheapgrad.auditing._forward_noise import same_number
from cheapgrad.auditing._precision import find_lowest_precision
from cheapgrad.auditing._step import DrawnGradient, Step
from cheapgrad.errors import BatchOrderError

# By how much loss and gradient may change with the order of examples: sums are rounded in another order. Of a network
# that has learned nothing the loss hardly depends on its input; the gradient does. Half precision has few places to
# lose: there fewer units in the last place are allowed.
# A loss near zero may be what is left of a sum of numbers that cancel, so that it counts as `_LEAST_LOSS` at least.
_SAME_LOSS_ULPS, _LEAST_LOSS = 4096, 1e-3
_SAME_GRADIENT, _SAME_ULPS = 0.01, 8


def check_order(
    step: Step, batch: Any, examples: int, whole: DrawnGradient | None, make_seed: Callable[[str], int]
) -> tuple[str, ...]:
    """Refuse a batch whose loss or gradient is another in reverse order; return a remark where that cannot be told.

    Where the loss of the exact gradient is unknown, or draws random numbers by position, the loss function itself is
    compared in evaluation mode: dropout does not tell examples apart there.

    Args:
        step: whose loss is compared.
        batch: the batch.
        examples: how many entries its first axis has.
        whole: exact gradient and loss from the seed "whole"; None if the loss is unknown, or the forward pass draws.
        make_seed: a seed for each text.

    Raises:
        BatchOrderError: the two losses, or gradients, differ.
    """
    reverse, where = reverse_examples(batch, examples), ""
    if whole is not None:
        other = step.draw_exact(reverse, make_seed("whole"))
    else:
        where = " in evaluation mode"
        try:
            whole, again = (step.evaluate(batch, make_seed(text)) for text in ("whole", "another"))
            other = step.evaluate(reverse, make_seed("whole"))
        except Exception as error:
            # Some models return something else in evaluation mode; whatever the reason, the audit itself goes on.
            return (say_unchecked(f"in evaluation mode the loss function raised {type(error).__name__}: {error}"),)
        if not math.isfinite(_loss(whole)):
            return (say_unchecked(f"in evaluation mode the loss is {_loss(whole):.9g}"),)
        if not same_number(_loss(whole), _loss(again), _dtype(step)):
            return (say_unchecked("it draws random numbers in evaluation mode too"),)
        if not is_same_order(_distance(whole, again), _dtype(step)):
            # A backward pass that draws by itself; its gradient tells nothing.
            whole = DrawnGradient([], whole.loss)
    distance, precision = _distance(whole, other), _dtype(step)
    if not is_same_order(distance, precision):
        # What a pass is computed in may be coarser than its parameters are.
        precision = find_lowest_precision(lambda: step.draw_exact(batch, make_seed("whole")))
    is_same = is_same_loss(_loss(whole), _loss(other), _dtype(step))
    if not (is_same and is_same_order(distance, precision)):
        raise BatchOrderError(
            f"the loss{where} is {_loss(whole):.9g}, and {_loss(other):.9g} with the batch's {examples} entries of the "
            f"first axis in reverse order, and the gradient differs by {distance:.2g} of its length, so these are no "
            "examples that a mini-batch could be cut into; pass split=False to leave out the mini-batch's variance"
        )
    return ()


def is_same_loss(first: float, second: float, dtype: torch.dtype) -> bool:
    """Tell whether losses of two orders of a batch differ by rounding only.

    Args:
        first: finite.
        second: may be anything.
        dtype: of the loss, or of the parameters.
    """
    unit = torch.finfo(dtype).eps
    slack = min(_SAME_LOSS_ULPS * unit, max(_SAME_ULPS * unit, _SAME_LOSS_ULPS * torch.finfo(torch.float32).eps))
    return abs(first - second) <= slack * max(abs(first), abs(second), _LEAST_LOSS)


def is_same_order(distance: float, dtype: torch.dtype) -> bool:
    """Tell whether gradients of two orders of a batch differ by rounding only.

    Args:
        distance: of the two, as `measure_distance` returns it.
        dtype: what they were computed in.
    """
    return distance <= max(_SAME_GRADIENT, _SAME_ULPS * torch.finfo(dtype).eps)


def measure_distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Return ``‖second − first‖ / ‖first‖`` of two gradients; 0 where there are none, or the first is zero.

    Args:
        first: by parameter.
        second: the same parameters.
    """
    differences = [one - other for one, other in zip(first, second, strict=True)]
    squares = (sum(float(inner_product(tensor, tensor)) for tensor in part) for part in (differences, first))
    of_difference, of_gradient = squares
    return math.sqrt(of_difference / of_gradient) if of_gradient else 0.0


def say_unchecked(reason: str) -> str:
    """Return the remark on a batch whose order could not be checked.

    Args:
        reason: why.
    """
    return f"nobody checked whether the order of the batch's examples changes its loss: {reason}"


def _loss(drawn: DrawnGradient) -> float:
    return math.nan if drawn.loss is None else drawn.loss


def _distance(one: DrawnGradient, other: DrawnGradient) -> float:
    """Return the relative distance of two gradients; 0 where one is unknown."""
    return measure_distance(one.tensors, other.tensors) if one.tensors and other.tensors else 0.0


def _dtype(step: Step) -> torch.dtype:
    return step.parameters[0].dtype
