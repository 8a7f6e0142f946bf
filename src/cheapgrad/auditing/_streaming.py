"""First three central moments of a stream of tensors, and the bias test that is made from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Past this sample skewness a mean of a few hundred draws is not near enough to normal for a test in its far tail.
LARGEST_TESTABLE_SKEWNESS = 3.0


class StreamingMoments:
    """Mean and sums of squared and cubed deviations of a stream of equal-shaped float64 tensors.

    The updates are Welford's, carried on to the third power: stable in floating point.

    Args:
        shape: shape of one value.
        device: where the sums are kept.
    """

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self.count = 0
        self.mean = torch.zeros(shape, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.mean)
        self.cubes = torch.zeros_like(self.mean)

    def add(self, value: Tensor) -> None:
        """Take in one value of the stream."""
        self.count += 1
        n = self.count
        deviation = value - self.mean
        share = deviation / n
        growth = deviation * share * (n - 1)
        self.mean += share
        self.cubes += growth * share * (n - 2) - 3 * share * self.squares
        self.squares += growth

    @property
    def standard_error(self) -> Tensor:
        """Standard error of the mean."""
        return (self.squares / ((self.count - 1) * self.count)).sqrt()

    @property
    def skewness(self) -> Tensor:
        """Sample skewness; zero where nothing varies."""
        n = self.count
        return torch.nan_to_num(self.cubes / n / (self.squares / n) ** 1.5, nan=0.0, posinf=0.0, neginf=0.0)

    def z_scores(self, resolution: Tensor | float) -> Tensor:
        """Return how many standard errors the mean is away from zero, a distance of `resolution` being forgiven.

        Student's statistic is t = mean / standard error. Where the values are skewed its tails are not Student's: a
        rare large value that happened not to come lowers the mean and the error together. Hall's (1992) transformation
        ``h(t) = t + a t²/3 + a² t³/27 + a/6``, ``a = skewness / √n``, removes that effect to first order. The answer is
        the one of t and h(t) that is nearer to zero, so that an alarm needs both.
        """
        beyond = (self.mean.abs() - resolution).clamp_min(0) * self.mean.sign()
        t = torch.where(beyond == 0, beyond, beyond / self.standard_error)
        a = self.skewness / math.sqrt(self.count)
        hall = t + a * t**2 / 3 + a**2 * t**3 / 27 + a / 6
        nearer = torch.where(hall.abs() < t.abs(), hall, t)
        corrected = torch.where(hall.sign() == t.sign(), nearer, torch.zeros_like(t))
        # Where nothing varies and the mean is off, t is infinite and there is no skewness to correct for.
        return torch.where(t.isinf(), t, corrected)
