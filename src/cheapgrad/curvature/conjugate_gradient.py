"""Conjugate gradients that keep what others throw away: directions, slopes and curvatures of every step."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.curvature.operators import AbstractOperator, as_operator
from cheapgrad.errors import (
    BudgetError,
    NonFiniteCurvatureError,
    ShapeError,
    SingularCurvatureError,
    check_count,
    check_instance,
)


class Magnitudes(enum.Enum):
    """How steps along the directions ``p_1 … p_K`` are computed from slopes and curvatures of the magnitude batch."""

    LINE_SEARCH = "line_search"
    """One after another, each the minimum along its direction from where the debiased iterate stands."""
    DIAGONAL = "diagonal"
    """Each direction by itself from the start, as if the directions were conjugate on the magnitude batch."""
    SUBSPACE = "subspace"
    """The minimum over the whole span of the directions: a K by K system."""


class StopReason(enum.Enum):
    """Why conjugate gradients ended; the value is a sentence for people."""

    CONVERGED = "the residual fell below the tolerance"
    ITERATIONS = "all iterations were used"
    CURVATURE = "the curvature along the next direction is not positive"


@dataclass(frozen=True)
class ConjugateGradientSettings:
    """When to stop and what to add.

    Args:
        iterations: at most this many, at least 1.
        damping: added to the diagonal of the curvature, at least 0.
        tolerance: stop when the residual's norm is below this share of the gradient's, in [0, 1); never below ten
            roundings of the dtype, past which directions are noise.

    Raises:
        BudgetError: if one of them is out of range.

    Example:
        >>> ConjugateGradientSettings(iterations=20, damping=1e-3)
        ConjugateGradientSettings(iterations=20, damping=0.001, tolerance=1e-06)
    """

    iterations: int = 50
    damping: float = 0.0
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_count("iterations", self.iterations)
        check_damping(self.damping)
        if not 0 <= self.tolerance < 1:
            raise BudgetError(f"tolerance must be in [0, 1), but got {self.tolerance!r}; use e.g. 1e-6")


@dataclass(frozen=True, eq=False)
class ConjugateGradientRun:
    """What one run of conjugate gradients saw.

    Attributes:
        directions_PK: conjugate directions, one for each step, of the lengths that the method gives them.
        slopes: ``[K]``, ``p_kᵀ ∇q`` where the iterate stands; negative.
        curvatures: ``[K]``, ``p_kᵀ (H + damping) p_k``; positive.
        residual_norms: ``[K + 1]``, from the start to the end.
        stopped: why it ended.
    """

    directions_PK: Tensor
    slopes: Tensor
    curvatures: Tensor
    residual_norms: Tensor
    stopped: StopReason

    @property
    def steps(self) -> Tensor:
        """Step lengths ``[K]`` along the directions."""
        return -self.slopes / self.curvatures

    def solution(self, steps: int | None = None) -> Tensor:
        """Return the iterate ``[P]`` after so many steps, all of them if left out.

        Args:
            steps: from 0 to the number of steps made.

        Raises:
            BudgetError: if there were fewer steps.
        """
        count = check_steps(steps, len(self.slopes))
        lengths = self.steps[:count].to(self.directions_PK)
        return self.directions_PK[:, :count] @ lengths


def run_conjugate_gradient(
    operator: Any, gradient: Tensor, settings: ConjugateGradientSettings | None = None
) -> ConjugateGradientRun:
    """Minimise ``q(δ) = ½ δᵀ (H + damping) δ + gᵀ δ`` from zero, on one batch.

    Args:
        operator: H, symmetric: anything with ``shape`` and ``@``.
        gradient: g, ``[P]``.
        settings: iterations, damping and tolerance.

    Returns:
        All directions, slopes and curvatures, from which every iterate follows.

    Law:
        In exact arithmetic step k minimises q over the span of ``g, Hg, …, H^(k-1) g``. Cost: one product a step. The
        curvatures are those of this batch along directions that this batch chose: biased, like its eigenvalues; see
        `debiased_conjugate_gradient`. Ends, and says so in `stopped`, where the curvature along a direction is not
        positive.

    Raises:
        SingularCurvatureError: if that is so in the first step already, so that there is no step to return.
        ShapeError: if the gradient does not fit.
        NonFiniteCurvatureError: if the gradient or a product is not finite.

    Example:
        >>> run = run_conjugate_gradient(torch.diag(torch.tensor([1.0, 4.0])), torch.tensor([2.0, 4.0]))
        >>> run.solution(), run.stopped
        (tensor([-2., -1.]), <StopReason.CONVERGED: 'the residual fell below the tolerance'>)

    References:
        Hestenes and Stiefel (1952), in the form of Nocedal and Wright (2006), algorithm 5.2.
    """
    operator = as_operator(operator)
    settings = ConjugateGradientSettings() if settings is None else settings
    check_instance("settings", settings, ConjugateGradientSettings, "use ConjugateGradientSettings(...)")
    check_gradient("gradient", gradient, operator)
    residual, direction = gradient.clone(), -gradient
    square = float(residual.double().square().sum())
    stop_at = max(settings.tolerance, 10 * torch.finfo(gradient.dtype).eps) ** 2 * square
    directions, slopes, curvatures, squares = [], [], [], [square]
    stopped = StopReason.ITERATIONS
    while len(directions) < settings.iterations:
        if square <= stop_at:
            stopped = StopReason.CONVERGED
            break
        product = operator @ direction + settings.damping * direction
        curvature = float(direction.double() @ product.double())
        if not _is_positive(curvature, direction, product):
            _refuse_first_step(directions, curvature, direction, settings.damping)
            stopped = StopReason.CURVATURE
            break
        slope = float(direction.double() @ residual.double())
        directions.append(direction)
        slopes.append(slope)
        curvatures.append(curvature)
        residual = residual - slope / curvature * product
        previous, square = square, float(residual.double().square().sum())
        squares.append(square)
        direction = square / previous * direction - residual
    if square <= stop_at:
        stopped = StopReason.CONVERGED
    return ConjugateGradientRun(
        directions_PK=torch.stack(directions, 1) if directions else gradient.new_zeros(len(gradient), 0),
        slopes=torch.tensor(slopes, dtype=torch.float64),
        curvatures=torch.tensor(curvatures, dtype=torch.float64),
        residual_norms=torch.tensor(squares, dtype=torch.float64).sqrt(),
        stopped=stopped,
    )


def check_gradient(name: str, gradient: Tensor, operator: AbstractOperator) -> None:
    """Raise unless `gradient` is a finite vector that fits the operator."""
    check_instance(name, gradient, Tensor, "use torch.as_tensor(...)")
    if gradient.shape != (operator.shape[0],):
        raise ShapeError(
            f"{name} must be a vector of {operator.shape[0]} parameters, but got the shape {tuple(gradient.shape)}"
        )
    if not torch.isfinite(gradient).all():
        raise NonFiniteCurvatureError(
            f"{int((~torch.isfinite(gradient)).sum())} entries of {name} are not finite; look at the loss"
        )


def check_damping(damping: float) -> None:
    """Raise `BudgetError` unless `damping` is a finite number of at least 0."""
    if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 <= damping < math.inf:
        raise BudgetError(f"damping must be a number of at least 0, but got {damping!r}; use e.g. damping=1e-3")


def check_steps(steps: int | None, made: int) -> int:
    """Return how many steps are meant; raise `BudgetError` if fewer were made."""
    if steps is None:
        return made
    if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps <= made:
        raise BudgetError(f"steps must be a whole number from 0 to {made}, the number made, but got {steps!r}")
    return steps


def _is_positive(curvature: float, direction: Tensor, product: Tensor) -> bool:
    """Whether a curvature is positive beyond the rounding of the product it was computed from."""
    scale = float(direction.double().norm() * product.double().norm())
    return curvature > torch.finfo(direction.dtype).eps * scale


def _refuse_first_step(directions: list[Tensor], curvature: float, direction: Tensor, damping: float) -> None:
    if directions:
        return
    along = curvature / float(direction.double().square().sum())
    raise SingularCurvatureError(
        f"the curvature along the gradient is {along:.3g} with damping={damping!r}, so the quadratic has no minimum "
        "there; increase the damping, or use a positive semi-definite curvature such as Gauss-Newton"
    )
