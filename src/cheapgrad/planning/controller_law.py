"""From measured curves to keep fractions: which budgets add a given noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from cheapgrad.errors import ControlError
from cheapgrad.planning.controller_curve import relative_variance

# Bisection steps: budgets to eight digits.
_HALVINGS = 40
#: The factor of all odds stays within this, as a logarithm.
LARGEST_SHIFT = 12.0
# Multiples of the first are spread over the unit interval most evenly; of both, over the square.
_GOLDEN_RATIO, _OTHER_RATIO = 0.6180339887498949, 0.7548776662466927


@dataclass(frozen=True)
class NoiseSchedule:
    """A target that moves from cheap to careful: geometric from `first` to `last` over `steps` optimizer steps.

    While the loss still falls fast, added noise costs few steps; near the end it costs as many more as it adds.

    Args:
        first: added variance ÷ mini-batch variance at step 0, > 0.
        last: the same from step `steps` on, > 0.
        steps: how many optimizer steps the way takes, at least 1.

    Raises:
        ControlError: if a number is out of range.

    >>> schedule = NoiseSchedule(first=0.4, last=0.1, steps=100)
    >>> schedule.target(0), round(schedule.target(50), 3), schedule.target(1000)
    (0.4, 0.2, 0.1)
    """

    first: float
    last: float
    steps: int

    def __post_init__(self) -> None:
        check_noise("first", self.first)
        check_noise("last", self.last)
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ControlError(f"steps must be a whole number of at least 1, but got {self.steps!r}")

    def target(self, step: int) -> float:
        """Return the target at an optimizer step."""
        if step >= self.steps:
            return self.last
        return self.first * (self.last / self.first) ** (step / self.steps)


def check_noise(name: str, value: object) -> float:
    """Return `value` as a float if it is a finite number above 0; raise `ControlError` otherwise."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:  # type: ignore[operator] - a number
        raise ControlError(
            f"{name} must be a finite number above 0, the added variance as a fraction of the mini-batch's, but got "
            f"{value!r}; use e.g. {name}=0.05, or revert the handle for exact gradients"
        )
    return float(value)  # type: ignore[arg-type] - a number


def shift_keep(keep: float, shift: float, least_keep: float) -> float:
    """Return the fraction whose odds are ``exp(shift)`` times those of `keep`, at least `least_keep`.

    >>> round(shift_keep(0.5, math.log(3), 0.05), 9)
    0.75
    """
    odds = math.exp(shift) * keep / (1 - keep) if keep < 1 else math.inf
    return max(least_keep, 1.0 if math.isinf(odds) else odds / (1 + odds))


def round_keep(keep: float, rows: int | None, step: int, place: int) -> float:
    """Return `keep` as a whole number of rows: of the two nearest, each as often over the steps as it is near.

    Args:
        keep: in (0, 1].
        rows: N, or None to leave `keep` as it is.
        step: takes turns, by the fractions of multiples of the golden ratio.
        place: lets layers take turns at different steps.

    >>> sum(round_keep(0.33, 10, step, 0) for step in range(1000)) / 1000
    0.33
    """
    if rows is None:
        return keep
    lower = math.floor(keep * rows)
    turn = (step * _GOLDEN_RATIO + place * _OTHER_RATIO) % 1
    return min(max(lower + (keep * rows - lower > turn), 1), rows) / rows


def predict_noise(curves: Mapping[str, Tensor], keeps: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Return the weighted sum of the draws' relative variances at their keep fractions."""
    return sum(weights[layer] * relative_variance(curve, keeps[layer]) for layer, curve in curves.items())


def find_shift(
    curves: Mapping[str, Tensor],
    keeps: Mapping[str, float],
    weights: Mapping[str, float],
    target: float,
    least_keep: float,
) -> float:
    """Return the shift of all keep fractions at which the curves predict `target`, or the nearest one in range.

    Raises:
        ControlError: if the target, a weight or a curve is not finite: no budget can be read off it.
    """
    for layer, curve in curves.items():
        if not (math.isfinite(target) and math.isfinite(weights[layer]) and bool(curve.isfinite().all())):
            raise ControlError(
                f"the noise of layer {layer!r} is not finite (weight {weights[layer]:.3g}, curve up to "
                f"{float(curve.max()):.3g}, target {target:.3g}); go on from a state that was saved before"
            )
    low, high = -LARGEST_SHIFT, LARGEST_SHIFT
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        shifted = {layer: shift_keep(keeps[layer], middle, least_keep) for layer in curves}
        low, high = (middle, high) if predict_noise(curves, shifted, weights) > target else (low, middle)
    return (low + high) / 2
