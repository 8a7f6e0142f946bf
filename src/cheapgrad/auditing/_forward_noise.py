"""Does the forward pass draw random numbers of its own, and do seeds govern them?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from cheapgrad.auditing._step import DrawnGradient, Step
from cheapgrad.errors import GradientDrawError, NondeterministicForwardError, ReferenceGradientError

# Losses and gradients that differ by fewer units in the last place are the same: sums of other orders.
_SAME_ULPS = 256
# A loss that hardly depends on a dropout's mask may come that near by chance, but not several times as near as this.
_BARELY_ULPS, _BARELY_SEEDS = 4, 4


def same_number(first: float, second: float, dtype: torch.dtype) -> bool:
    """Tell whether two losses differ by rounding only."""
    return math.isclose(first, second, rel_tol=_SAME_ULPS * torch.finfo(dtype).eps, abs_tol=1e-30)


def _check_finite(step: Step, drawn: DrawnGradient) -> None:
    for name, tensor in zip(step.names, drawn.tensors, strict=True):
        if not bool(tensor.isfinite().all()):
            raise GradientDrawError(
                f"the exact gradient of {name!r} is not finite (loss {_text(drawn)}): nothing can be compared with it; "
                "look for a square root, logarithm or norm at zero in the model or the loss"
            )


def find_noise(step: Step, batch: Any, make_seed: Callable[[str], int], *, seed_given: bool) -> bool:
    """Tell whether the exact gradient is another for another seed: by dropout, for example.

    Args:
        step: whose exact gradient is looked at.
        batch: the batch.
        make_seed: a seed for each text.
        seed_given: whether the caller knows that the forward pass draws.

    Raises:
        NondeterministicForwardError: it draws and the caller gave no seed, or it differs under equal seeds.
        ReferenceGradientError: the forward pass draws nothing, but the gradient does.
        GradientDrawError: the gradient is not finite.
    """
    first = step.draw_exact(batch, make_seed("first"))
    _check_finite(step, first)
    other = step.draw_exact(batch, make_seed("other"))
    if _same_gradient(first, other):
        return False
    again = step.draw_exact(batch, make_seed("first"))
    if not (_same_loss(first, again) and _same_gradient(first, again)):
        raise NondeterministicForwardError(
            f"two exact steps with the same seed differ (losses {_text(first)} and {_text(again)}): the model draws "
            "from a generator of its own or keeps state between calls; let it draw from torch's, Python's or NumPy's "
            "default generator, or call model.eval()"
        )
    if _is_deterministic(step, batch, first, make_seed):
        raise ReferenceGradientError(
            "the exact gradient differs from run to run although the loss does not, so its backward pass is random; "
            "exact() reaches cheapgrad's own layers only: pass reference=, a function (model, batch) that returns the "
            "exact gradient or a loss whose gradient is exact"
        )
    if not seed_given:
        raise NondeterministicForwardError(
            f"the forward pass draws random numbers (losses {_text(first)} and {_text(other)} for the same batch), as "
            "dropout does; pass seed=0, so that every draw is compared with the exact gradient under the same random "
            "numbers, or call model.eval()"
        )
    return True


def _is_deterministic(step: Step, batch: Any, first: DrawnGradient, make_seed: Callable[[str], int]) -> bool:
    """Tell whether the loss is the same for every seed; not known where a reference returns gradients alone."""
    if first.loss is None:
        return False
    slack = _BARELY_ULPS * torch.finfo(first.tensors[0].dtype).eps
    others = (step.draw_exact(batch, make_seed(f"other {number}")).loss for number in range(_BARELY_SEEDS))
    return all(other is not None and math.isclose(first.loss, other, rel_tol=slack) for other in others)


def _same_loss(first: DrawnGradient, second: DrawnGradient) -> bool:
    if first.loss is None or second.loss is None:
        return True
    return same_number(first.loss, second.loss, first.tensors[0].dtype)


def _same_gradient(first: DrawnGradient, second: DrawnGradient) -> bool:
    largest = max(float(tensor.abs().max()) if tensor.numel() else 0.0 for tensor in first.tensors)
    return all(
        bool(((one - two).abs() <= _SAME_ULPS * torch.finfo(one.dtype).eps * largest).all())
        for one, two in zip(first.tensors, second.tensors, strict=True)
    )


def _text(drawn: DrawnGradient) -> str:
    return "unknown" if drawn.loss is None else f"{drawn.loss:.9g}"
