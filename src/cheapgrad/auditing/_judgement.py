"""From the errors of draws to a verdict: z-scores, their band, and what would have been seen."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cheapgrad.auditing._errors_drawn import DrawnErrors
from cheapgrad.auditing._mean_test import mean_z_scores, standard_errors
from cheapgrad.auditing.student import student_band
from cheapgrad.errors import BudgetError

# One-sided 99 % point of the normal distribution.
_NORMAL_99 = 2.33


@dataclass(frozen=True)
class Judgement:
    """What draws say about bias.

    Attributes:
        tests: how many z-scores share the level.
        band: largest absolute z-score that chance explains.
        along: z-score along the exact gradient, of the whole and of each tensor, shape ``[1 + T]``.
        largest: largest absolute z-score of each tensor, shape ``[T]``.
        reach: error along the exact gradient that would have been found with probability 0.99, of the whole and of each
            tensor, as ``⟨error, g⟩``, shape ``[1 + T]``.
    """

    tests: int
    band: float
    along: Tensor
    largest: Tensor
    reach: Tensor

    @property
    def max_abs_z(self) -> float:
        """The largest absolute z-score of all."""
        return max(float(self.along[0].abs()), float(self.largest.max()))

    @property
    def alarm(self) -> bool:
        """Whether a z-score lies beyond the band."""
        return not self.max_abs_z <= self.band


def check_alpha(alpha: float) -> None:
    """Refuse a level outside of (0, 1)."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1:
        raise BudgetError(f"alpha must be in (0, 1), but got {alpha!r}; use e.g. 0.01")


def judge(errors: DrawnErrors, resolutions: list[Tensor], alpha: float, first: Tensor | None = None) -> Judgement:
    """Return z-scores and their band.

    Args:
        errors: of all draws.
        resolutions: for each tensor, how large its projections may be without being a bias.
        alpha: level that all tests share (Bonferroni).
        first: which draws, as booleans ``[n]``, made the alarm that the others have to confirm; None if there was none.
            A z-score is then the one nearer to zero of that of the first draws and that of all.
    """
    counts = [len(resolution) for resolution in resolutions]
    heads = torch.tensor([0, *counts]).cumsum(0)[:-1]
    series = torch.cat([errors.along.sum(1, keepdim=True), errors.projections], dim=1)
    flat = torch.cat(resolutions)
    # What is forgiven in every tensor may add up in the whole.
    resolution = torch.cat([flat[heads].sum().view(1), flat])
    series_of_alarm = series if first is None else series[first]
    z_scores = mean_z_scores(series_of_alarm, resolution)
    if first is not None:
        z_scores = _nearer_to_zero(z_scores, mean_z_scores(series, resolution))
    tests, draws = series.shape[1], len(series_of_alarm)
    band = student_band(alpha / tests, draws - 1)
    # A bias beyond the band by this margin is found 99 times in 100: besides the mean, the standard error is itself
    # estimated, here and in the audit that has to find the bias.
    margin = band + _NORMAL_99 * math.sqrt(1 + band**2 / (draws - 1))
    along_columns = torch.cat([torch.zeros(1, dtype=torch.long), 1 + heads])
    largest = torch.stack([part.abs().max() for part in z_scores[1:].split(counts)])
    constant = torch.where(errors.wrong, math.inf, 0.0).double()
    return Judgement(
        tests=tests,
        band=band,
        along=z_scores[along_columns],
        largest=torch.where(errors.varies, largest, constant),
        reach=margin * standard_errors(series_of_alarm[:, along_columns]) + resolution[along_columns],
    )


def _nearer_to_zero(first: Tensor, second: Tensor) -> Tensor:
    nearer = torch.where(second.abs() < first.abs(), second, first)
    return torch.where(first.sign() == second.sign(), nearer, torch.zeros_like(nearer))
