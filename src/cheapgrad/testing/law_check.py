"""Holding a strategy to its law: is it unbiased, and has it the variance it states?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from cheapgrad.errors import BudgetError, PlacementError, check_count
from cheapgrad.sketch import AbstractStrategy, DenseMatrix, Moment, Operands, Variance
from cheapgrad.testing.layer_problem import LayerProblem, make_layer_problem

# Fixed random directions on which the mean error is projected, beside the direction of the truth.
_DIRECTIONS = 16
_DIRECTION_SEED = 20240229
_DRAWS_AT_ONCE = 2000
# Below this share of ||truth||**2 a squared error is the rounding of float64.
_ROUNDING = 1e-20
# The measured mean must be known to this share of the truth, or the check says nothing.
_LARGEST_STANDARD_ERROR = 0.01


@dataclass(frozen=True)
class TargetReport:
    """What was measured of one gradient.

    Attributes:
        name: ``"dX"`` or ``"dW"``.
        measured_variance: mean of ``||estimate - truth||**2``.
        predicted_variance: what the law says it is.
        variance_standard_error: standard error of `measured_variance`.
        max_abs_z: largest absolute z-score of the mean error: along the truth, along random directions, and in all.
        standard_error_fraction: largest standard error of a projected mean, as a share of ``||truth||``.
    """

    name: str
    measured_variance: float
    predicted_variance: float
    variance_standard_error: float
    max_abs_z: float
    standard_error_fraction: float

    @property
    def variance_ratio(self) -> float:
        """Measured over predicted variance; 1 where both are zero."""
        if self.predicted_variance == 0:
            return 1.0 if self.measured_variance == 0 else math.inf
        return self.measured_variance / self.predicted_variance


@dataclass(frozen=True)
class LawReport:
    """The outcome of `check_law`.

    Attributes:
        strategy: as it prints.
        moment: where it was placed, ``"stored"`` or ``"cotangent"``.
        draws: how many were made, fixed beforehand.
        band: largest absolute z-score that chance explains.
        targets: what was measured, per gradient.
        biased: names of the gradients whose mean is wrong.
        wrong_variance: names of the gradients whose variance is not the stated one.
        inconclusive: names of the gradients for which the draws were too few to tell.
    """

    strategy: str
    moment: str
    draws: int
    band: float
    targets: tuple[TargetReport, ...]
    biased: tuple[str, ...]
    wrong_variance: tuple[str, ...]
    inconclusive: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the law holds and the draws sufficed to say so."""
        return not (self.biased or self.wrong_variance or self.inconclusive)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able data."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """Say in a few lines what was found."""
        broken = self.biased or self.wrong_variance
        verdict = "LAW BROKEN" if broken else ("ok" if self.ok else "INCONCLUSIVE")
        lines = [f"{self.strategy} in {self.moment}=, {self.draws} draws: {verdict}"]
        for target in self.targets:
            words = [
                word
                for word, names in (
                    ("biased", self.biased),
                    ("wrong variance", self.wrong_variance),
                    ("inconclusive: more draws needed", self.inconclusive),
                )
                if target.name in names
            ]
            lines.append(
                f"  {target.name}: largest |z| {target.max_abs_z:.2f} (band {self.band:.2f}), standard error "
                f"{target.standard_error_fraction:.2%} of the truth, measured/predicted variance "
                f"{target.variance_ratio:.3f}{': ' + ', '.join(words) if words else ''}"
            )
        return "\n".join(lines)


def check_law(
    strategy: AbstractStrategy,
    *,
    moment: Moment | None = None,
    problem: LayerProblem | None = None,
    draws: int = 20_000,
    alpha: float = 1e-6,
    tolerance: float = 0.05,
    memory: Any = None,
    predicted: Variance | None = None,
    seed: int = 0,
) -> LawReport:
    r"""Draw a strategy a fixed number of times and compare mean and variance with its law.

    With errors ``e_m = estimate_m - truth`` over M draws, three kinds of z-score test the bias: of the mean along the
    truth, along 16 fixed random directions, and of ``sqrt(M ||mean e||**2 / V)``, which sees a bias in every direction
    (its tail is at most that of one normal number). All are held against one band (Bonferroni). The mean of
    ``||e||**2`` over the predicted variance must lie in ``[1 - tolerance, 1 + tolerance]``. Draws are vectorised by
    `torch.func.vmap`, so a strategy must keep shapes static inside torch.func transforms, as layers need it anyway.

    Args:
        strategy: what to check.
        moment: where it is placed; its usual moment if left out.
        problem: the layer; `make_layer_problem()` if left out.
        draws: M, at least 100; never adapted to the outcome.
        alpha: probability, in (0, 1), that chance alone makes an unbiased strategy fail, over all z-scores together.
        tolerance: allowed relative difference of the variances, in (0, 1).
        memory: running estimates the strategy reads, or None.
        predicted: the variance to hold it to, where the law depends on `memory`; the law's own if left out.
        seed: of torch's default generator for the draws; its state is put back afterwards.

    Returns:
        A report, with `ok` false if the strategy is biased, has another variance, **or the draws do not suffice to
        tell**: a standard error above 1 % of ``||truth||``, or of the variance above a third of `tolerance`.

    Raises:
        BudgetError: if `draws`, `alpha` or `tolerance` is out of range.
        PlacementError: if the strategy has no meaning at `moment`, or is no strategy.

    >>> from cheapgrad.sketch import ColumnSample
    >>> check_law(ColumnSample(keep=0.6)).ok
    True
    """
    if not isinstance(strategy, AbstractStrategy):
        raise PlacementError(f"strategy must be a strategy such as RowSample(keep=0.5), but got {strategy!r}")
    if moment is not None and not isinstance(moment, Moment):
        raise PlacementError(f"moment must be Moment.STORED or Moment.COTANGENT, but got {moment!r}")
    check_count("draws", draws, minimum=100)
    for name, value in (("alpha", alpha), ("tolerance", tolerance)):
        if not 0 < value < 1:
            raise BudgetError(f"{name} must be in (0, 1), but got {value!r}")
    moment = moment or strategy.law.moments[0]
    strategy.check_placement(moment)
    problem = problem or make_layer_problem()
    truths, draw = _estimator(strategy, moment, problem, memory)
    if predicted is None:
        weight_OI = problem.weight_OI if moment is Moment.COTANGENT else None
        predicted = strategy.law.variance(
            problem.stored_NI, problem.cotangent_NO, weight_OI, moment=moment, examples=problem.examples
        )
    variances = {"dX": float(predicted.input), "dW": float(predicted.weight)}
    sums = {name: _Sums(truth) for name, truth in truths.items()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, draws, _DRAWS_AT_ONCE):
            chunk = torch.zeros(min(_DRAWS_AT_ONCE, draws - start))
            for name, estimates in torch.func.vmap(draw, randomness="different")(chunk).items():
                sums[name].add(estimates)
    targets = tuple(sums[name].report(name, variances[name], draws) for name in truths)
    band = -NormalDist().inv_cdf(alpha / (2 * len(targets) * (_DIRECTIONS + 2)))
    return _judge(strategy, moment, draws, band, targets, tolerance)


def _estimator(
    strategy: AbstractStrategy, moment: Moment, problem: LayerProblem, memory: Any
) -> tuple[dict[str, Tensor], Callable[[Tensor], dict[str, Tensor]]]:
    """Return the exact gradients that the strategy changes, and a function that draws estimates of them."""
    rows, inputs = problem.stored_NI.shape
    dense = DenseMatrix(problem.stored_NI)
    if moment is Moment.STORED:
        operands = Operands(moment, dense, examples=problem.examples)

        def draw_stored(_: Tensor) -> dict[str, Tensor]:
            stored = strategy.restore(strategy.store(operands, memory), rows, inputs, problem.stored_NI.dtype)
            return {"dW": stored.contract(problem.cotangent_NO)}

        return {"dW": problem.weight_gradient}, draw_stored
    operands = Operands(moment, dense, problem.cotangent_NO, problem.weight_OI, problem.examples)

    def draw_cotangent(_: Tensor) -> dict[str, Tensor]:
        drawn = strategy.draw(operands, memory)
        return {"dX": drawn.input_gradient(problem.weight_OI), "dW": drawn.weight_gradient(dense)}

    return {"dX": problem.input_gradient, "dW": problem.weight_gradient}, draw_cotangent


class _Sums:
    """Running sums of one gradient's errors."""

    def __init__(self, truth: Tensor) -> None:
        self._truth = truth.flatten().double()
        generator = torch.Generator().manual_seed(_DIRECTION_SEED)
        random = torch.randn(_DIRECTIONS, self._truth.shape[0], generator=generator, dtype=torch.float64)
        directions = torch.cat([self._truth.unsqueeze(0), random])
        self._directions = torch.nn.functional.normalize(directions, dim=1)
        self._error = torch.zeros_like(self._truth)
        self._projected_squares = torch.zeros(_DIRECTIONS + 1, dtype=torch.float64)
        self._squares = torch.zeros(2, dtype=torch.float64)

    def add(self, estimates: Tensor) -> None:
        """Take in estimates, stacked along the first axis."""
        errors = estimates.flatten(1).double() - self._truth
        self._error += errors.sum(0)
        self._projected_squares += (errors @ self._directions.T).square().sum(0)
        squares = errors.square().sum(1)
        self._squares += torch.stack([squares.sum(), squares.square().sum()])

    def report(self, name: str, predicted: float, draws: int) -> TargetReport:
        """Return what was found after `draws` draws."""
        squared_truth = float(self._truth.square().sum())
        measured, fourth = (self._squares / draws).tolist()
        if max(measured, predicted) <= _ROUNDING * squared_truth:
            return TargetReport(name, 0.0, 0.0, 0.0, 0.0, 0.0)
        mean = self._error / draws
        along = self._directions @ mean
        spread = (self._projected_squares / draws - along.square()).clamp(min=0)
        standard_error = (spread / (draws - 1)).sqrt()
        # A mean error that never varies has no standard error: it is a bias, unless it is rounding.
        noise = math.sqrt(_ROUNDING * squared_truth)
        scores = along.abs() / standard_error.clamp(min=noise)
        variance = max(measured - float(mean.square().sum()), _ROUNDING * squared_truth)
        total = math.sqrt(draws * float(mean.square().sum()) / variance)
        return TargetReport(
            name=name,
            measured_variance=measured,
            predicted_variance=predicted,
            variance_standard_error=math.sqrt(max(fourth - measured**2, 0.0) / (draws - 1)),
            max_abs_z=max(float(scores.max()), total),
            standard_error_fraction=float(standard_error.max()) / math.sqrt(squared_truth),
        )


def _judge(
    strategy: AbstractStrategy,
    moment: Moment,
    draws: int,
    band: float,
    targets: tuple[TargetReport, ...],
    tolerance: float,
) -> LawReport:
    # Written so that a NaN anywhere is a failure.
    biased = [target.name for target in targets if not target.max_abs_z <= band]
    wrong = [target.name for target in targets if not abs(target.variance_ratio - 1) <= tolerance]
    vague = [
        target.name
        for target in targets
        if not target.standard_error_fraction <= _LARGEST_STANDARD_ERROR
        or not target.variance_standard_error <= tolerance / 3 * target.measured_variance
    ]
    return LawReport(
        strategy=repr(strategy),
        moment=moment.value,
        draws=draws,
        band=band,
        targets=targets,
        biased=tuple(biased),
        wrong_variance=tuple(wrong),
        inconclusive=tuple(vague),
    )
