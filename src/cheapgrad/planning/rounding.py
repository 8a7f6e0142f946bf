"""Parameters whose gradient is nothing but rounding, such as the bias of attention's keys."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from cheapgrad.auditing._examples import map_tensors
from cheapgrad.auditing._surroundings import evaluating
from cheapgrad.planning.passes import Step

# A gradient is rounding if that of a copy in double precision is off by more than this share of its length, while all
# parameters together agree to within the other one: else the two are not of the same thing.
_ROUNDING, _SAME = 0.5, 0.25


def find_rounding(step: Step, batch: object) -> tuple[frozenset[str], list[str]]:
    """Return the names of parameters whose gradient is rounding, in evaluation mode, and a remark if nobody can tell.

    The size of a gradient does not tell: in half precision the rounding of one may be as large as all of another. Nor
    does the order of the examples, each of which is rounded in the same way in any order.

    Args:
        step: whose gradients are in plain units.
        batch: a batch.
    """
    try:
        with evaluating(step.model), step.undisturbed():
            own, _ = step.gradient(batch)
            precise = Step(copy.deepcopy(step.model).double(), step.loss_fn, step.seed)
            truth, _ = precise.gradient(
                map_tensors(batch, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
            )
    except Exception as error:
        # Models that have no copy, no double precision or no evaluation mode are planned for all the same.
        text = " ".join(str(error).split())
        return frozenset(), [_say_untold(f"{type(error).__name__}: {text[:120]}")]
    lengths = [_length(gradient) for gradient in own]
    apart = [_length(one.double() - other) for one, other in zip(own, truth, strict=True)]
    if torch.tensor(apart).norm() > _SAME * torch.tensor(lengths).norm():
        return frozenset(), [_say_untold("a copy in double precision has another gradient")]
    names = [name for name, _ in step.named_parameters]
    trios = zip(names, apart, lengths, strict=True)
    return frozenset(name for name, error, length in trios if length > 0 and error > _ROUNDING * length), []


def _say_untold(reason: str) -> str:
    return f"whether a parameter's gradient is nothing but rounding was judged by its size alone: {reason}"


def _length(gradient: Tensor) -> float:
    return float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
