"""A loss near its minimum, with known constants: how many steps stochastic gradient descent needs to a target."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cheapgrad.errors import TheoryError

_MOST_STEPS = 2**40
_STEP_SIZES = 400


@dataclass(frozen=True)
class LocalQuadratic:
    r"""``f(x) = f* + ½ Σ_i λ_i x_i²``, its gradient seen with independent noise of variance s_i along direction i.

    Args:
        curvature: λ_i, the eigenvalues of the Hessian at the minimum, all above 0.
        squared_distance: ``x_i²`` at the start, along the same directions.
        variance: s_i, the variance of one mini-batch gradient along the same directions.

    Raises:
        TheoryError: if the three have different lengths, or a value is out of its range.

    Law:
        Exact for this model: with ``ρ_i = (1 − ηλ_i)²`` and added noise ω,
        ``E f(x_t) − f* = ½ Σ λ_i [ρ_i^t x_i² + η² s_i (1 + ω) (1 − ρ_i^t) / (1 − ρ_i)]``. For another loss it holds as
        far as Hessian and noise are those at the minimum.

    >>> problem = LocalQuadratic(curvature=(1.0, 0.1), squared_distance=(1.0, 1.0), variance=(0.1, 0.1))
    >>> problem.count_steps(step_size=0.1, target=0.05)
    18
    """

    curvature: tuple[float, ...]
    squared_distance: tuple[float, ...]
    variance: tuple[float, ...]

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in ("curvature", "squared_distance", "variance")}
        if len(set(lengths.values())) != 1 or not self.curvature:
            raise TheoryError(
                f"give one curvature, squared distance and variance for each direction, but got {lengths}"
            )
        for name, lowest in (("curvature", "above 0"), ("squared_distance", "at least 0"), ("variance", "at least 0")):
            for value in getattr(self, name):
                if not math.isfinite(value) or value < 0 or (value == 0 and name == "curvature"):
                    raise TheoryError(f"{name} must be finite and {lowest}, but has {value!r}")

    def excess(self, steps: float, step_size: float, noise: float = 0.0) -> float:
        """Return ``E f(x_t) − f*`` after t steps.

        Args:
            steps: t.
            step_size: η.
            noise: ω, added variance divided by that of the mini-batch.
        """
        return float(self._excesses(np.array([float(steps)]), np.array([step_size]), noise)[0])

    def _excesses(self, steps: np.ndarray, step_sizes: np.ndarray, noise: float) -> np.ndarray:
        curvature, distance, variance = (
            np.asarray(values)[None] for values in (self.curvature, self.squared_distance, self.variance)
        )
        eta = step_sizes[:, None]
        kept = (1 - eta * curvature) ** 2
        # log1p keeps small steps apart from none.
        gone = -np.expm1(steps[:, None] * np.log(np.maximum(kept, 1e-300)))
        settled = eta**2 * variance * (1 + noise) / (1 - kept)
        return 0.5 * (curvature * ((1 - gone) * distance + gone * settled)).sum(1)

    def count_steps(self, target: float, noise: float = 0.0, step_size: float | None = None) -> int | None:
        """Return after how many steps the expected excess is at most `target`.

        Args:
            target: expected excess loss to reach, above 0.
            noise: ω, added variance divided by that of the mini-batch.
            step_size: η, constant; None takes the one that needs the fewest steps (`best_step_size`).

        Returns:
            The number of steps; None if it is never reached with this step size.
        """
        steps = self.solve_steps(target, noise, step_size)
        return None if not math.isfinite(steps) else math.ceil(steps)

    def solve_steps(self, target: float, noise: float = 0.0, step_size: float | None = None) -> float:
        """Return the real number t at which the expected excess is `target`; infinity if it never is.

        Args:
            target: as in `count_steps`.
            noise: as in `count_steps`.
            step_size: as in `count_steps`.
        """
        size = self.best_step_size(target, noise) if step_size is None else step_size
        return float(self._real_steps(np.array([size]), target, noise)[0])

    def best_step_size(self, target: float, noise: float = 0.0) -> float:
        """Return the constant step size that reaches the target in the fewest steps.

        Args:
            target: expected excess loss to reach, above 0.
            noise: ω, added variance divided by that of the mini-batch.

        Raises:
            TheoryError: if the target or the noise is out of its range, or the start is at the target already.
        """
        if not 0 < target < math.inf:
            raise TheoryError(f"target must be a finite excess loss above 0, but got {target!r}")
        if not 0 <= noise < math.inf:
            raise TheoryError(f"noise must be finite and at least 0, but got {noise!r}")
        start = 0.5 * float(np.dot(self.curvature, self.squared_distance))
        if start <= target:
            raise TheoryError(f"the start has an excess of {start:.4g}, at most the target {target:.4g}: nothing to do")
        largest = 2 / max(self.curvature)
        low, high = 1e-9 * largest, largest * (1 - 1e-6)
        for _ in range(3):
            sizes = np.geomspace(low, high, _STEP_SIZES)
            best = int(np.argmin(self._real_steps(sizes, target, noise)))
            low, high = sizes[max(best - 1, 0)], sizes[min(best + 1, _STEP_SIZES - 1)]
        return float(sizes[best])

    def _real_steps(self, step_sizes: np.ndarray, target: float, noise: float) -> np.ndarray:
        """Return real numbers of steps, by doubling and bisection; infinite where the target is never reached."""
        high = np.ones_like(step_sizes)
        while True:
            short = (self._excesses(high, step_sizes, noise) > target) & (high < _MOST_STEPS)
            if not short.any():
                break
            high = np.where(short, 2 * high, high)
        reached = self._excesses(high, step_sizes, noise) <= target
        low = np.where(high > 1, high / 2, 0.0)
        for _ in range(60):
            middle = (low + high) / 2
            above = self._excesses(middle, step_sizes, noise) > target
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        return np.where(reached, high, np.inf)
