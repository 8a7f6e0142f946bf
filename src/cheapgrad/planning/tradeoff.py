"""Cheaper steps against more of them: when does a noisy gradient pay?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cheapgrad.errors import TheoryError
from cheapgrad.planning.batch_curve import BatchCurve, read_real
from cheapgrad.planning.local_quadratic import LocalQuadratic


@dataclass(frozen=True)
class Tradeoff:
    """What added noise does to the number of steps and to their total cost; see `tradeoff`. All figures are modelled.

    Attributes:
        cost: c, cost of a step as a fraction of an exact one.
        noise: ω, added variance divided by that of the mini-batch gradient.
        steps_ratio: steps (or epochs) to the target, divided by those of the exact gradient.
        signal_dominated_steps_ratio: the same where the mini-batch is far less noisy than the target asks: 1.
        noise_dominated_steps_ratio: the same where the mini-batch's noise decides: 1 + ω.
        assumption: what `steps_ratio` rests on.
    """

    cost: float
    noise: float
    steps_ratio: float
    signal_dominated_steps_ratio: float
    noise_dominated_steps_ratio: float
    assumption: str

    @property
    def cost_ratio(self) -> float:
        """Total cost to the target, divided by that of the exact gradient: ``c × steps_ratio``."""
        return self.cost * self.steps_ratio

    @property
    def signal_dominated_cost_ratio(self) -> float:
        """The same where signal decides: c."""
        return self.cost * self.signal_dominated_steps_ratio

    @property
    def noise_dominated_cost_ratio(self) -> float:
        """The same where noise decides: ``c (1 + ω)``; a smaller batch has exactly 1."""
        return self.cost * self.noise_dominated_steps_ratio

    @property
    def beats_smaller_batch(self) -> bool:
        """Whether it costs less than a smaller batch of equal step cost where noise decides: ``c (1 + ω) < 1``."""
        return self.noise_dominated_cost_ratio < 1

    def to_dict(self) -> dict[str, Any]:
        """Return the figures, the derived ones included, ready for JSON."""
        derived = ("cost_ratio", "signal_dominated_cost_ratio", "noise_dominated_cost_ratio", "beats_smaller_batch")
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in derived}}


def tradeoff(
    cost: float,
    noise: float,
    *,
    noise_to_target: float = math.inf,
    problem: LocalQuadratic | None = None,
    target: float | None = None,
    smaller_batches: Mapping[float, float] | None = None,
) -> Tradeoff:
    r"""Predict how many more steps a noisy gradient needs, and what they cost in total.

    Where only ω is known, the answer is that of the bound for smooth losses
    ``E‖∇f‖² ≤ x² + 2xσ``, ``x² = 2LΔ/T``: the steps T to ``E‖∇f‖² ≤ ε`` grow with σ² (1 + ω) as

    ``T(ω) / T(0) = [(√(ν(1 + ω) + 1) + √(ν(1 + ω))) / (√(ν + 1) + √ν)]²``,  ``ν = σ²/ε``,

    from 1 where the target is far above the mini-batch's noise (ν → 0, early in training) to 1 + ω where it is far
    below (ν → ∞). Where the constants of the loss are known, ``problem`` and ``target`` give the ratio of the steps of
    stochastic gradient descent, each with its own best constant step size. Where exact trainings on smaller batches
    were measured, it is read off them: half the batch has as much noise again, ``1 + ω = 2``.

    Args:
        cost: c, cost of a step as a fraction of an exact one, above 0.
        noise: ω, added variance divided by that of the mini-batch gradient, at least 0.
        noise_to_target: ν, variance of the mini-batch gradient divided by the squared gradient norm to be reached; by
            default noise decides.
        problem: the constants of a loss near its minimum; takes the place of the bound.
        target: with `problem`, the expected excess loss to reach.
        smaller_batches: by share of the batch, in (0, 1), the measured ratio of steps of exact training on it, such as
            ``{0.5: 1.4, 0.25: 1.8}``; takes the place of the bound. Give ω in units of the optimizer's steps then.

    Returns:
        Ratios of steps and of total cost, in both regimes and in the mix that was asked for.

    Law:
        Assumes: unbiased gradients with noise independent from step to step; plain gradient descent with a step size
        tuned for each; noise whose shape over the directions is that of the mini-batch's. Adam, momentum, a step size
        that is not tuned again, or noise that is clipped change the ratio; smaller batches of the same training have
        these in them, and only the shape of the noise is assumed. Of the bound, only the ratio is used. A
        smaller batch of share q has c = q and 1 + ω = 1/q: where noise decides it neither wins nor loses.

    Raises:
        TheoryError: if a value is out of its range, only one of `problem` and `target` is given, or two of
            `noise_to_target`, `problem` and `smaller_batches`.

    >>> result = tradeoff(cost=0.75, noise=0.085)
    >>> round(result.steps_ratio, 3), round(result.cost_ratio, 3), result.beats_smaller_batch
    (1.085, 0.814, True)
    >>> round(tradeoff(cost=0.75, noise=0.085, noise_to_target=0.01).steps_ratio, 3)
    1.008
    >>> round(tradeoff(cost=0.75, noise=1.0, smaller_batches={0.5: 1.4, 0.25: 1.8}).steps_ratio, 3)
    1.4

    References:
        S. Ghadimi, G. Lan, "Stochastic first- and zeroth-order methods for nonconvex stochastic programming", SIAM J.
        Optim. 23 (2013), for the form of the bound. The comparison with a smaller batch at equal cost is ours.
    """
    cost, noise = _read("cost", cost, "finite and above 0"), _read("noise", noise, "finite and at least 0")
    noise_to_target = _read("noise_to_target", noise_to_target, "at least 0 (math.inf: noise decides)")
    if (problem is None) != (target is None):
        missing = "target" if target is None else "problem"
        raise TheoryError(f"problem and target go together, but {missing} is missing")
    given = {
        "noise_to_target": noise_to_target != math.inf,
        "problem": problem is not None,
        "smaller_batches": smaller_batches is not None,
    }
    if sum(given.values()) > 1:
        names = " and ".join(name for name, is_given in given.items() if is_given)
        raise TheoryError(f"{names} are different ways to the ratio of steps; give one of them")
    if smaller_batches is not None:
        ratio, assumption = _ratio_of_batches(smaller_batches, noise)
    elif problem is not None and target is not None:
        ratio, assumption = _ratio_of_problem(problem, target, noise)
    else:
        ratio, assumption = _ratio_of_bound(noise, noise_to_target)
    return Tradeoff(cost, noise, ratio, 1.0, 1.0 + noise, assumption)


def _read(name: str, value: Any, allowed: str) -> float:
    """Return a number in its range as a float."""
    found = read_real(value)
    is_in_range = found > 0 if "above" in allowed else found >= 0
    if not is_in_range or (math.isinf(found) and "finite" in allowed):
        raise TheoryError(f"{name} must be {allowed}, but got {value!r}")
    return found


def _ratio_of_bound(noise: float, noise_to_target: float) -> tuple[float, str]:
    if math.isinf(noise_to_target):
        return 1 + noise, "noise dominates: steps in proportion to the gradient's variance"
    more = noise_to_target * (1 + noise)
    root = (math.sqrt(more + 1) + math.sqrt(more)) / (math.sqrt(noise_to_target + 1) + math.sqrt(noise_to_target))
    return root**2, f"the bound for smooth losses, variance / target = {noise_to_target:g}"


def _ratio_of_batches(smaller_batches: Mapping[float, float], noise: float) -> tuple[float, str]:
    curve = BatchCurve.from_shares(smaller_batches)
    least = 1 / (1 + curve.most)
    assumption = f"as many steps as a smaller batch of as much noise, measured down to {least:g} of the batch"
    if noise > curve.most:
        assumption += f"; a batch of {1 / (1 + noise):.2g} is beyond, on the last slope"
    return curve.read(noise), assumption


def _ratio_of_problem(problem: LocalQuadratic, target: float, noise: float) -> tuple[float, str]:
    exact, noisy = (problem.solve_steps(target, omega) for omega in (0.0, noise))
    if not math.isfinite(noisy):
        raise TheoryError(f"no step size reaches an excess of {target!r} on this problem; take a larger target")
    return noisy / exact, f"gradient descent near a minimum, best constant step size each, to an excess of {target:g}"
