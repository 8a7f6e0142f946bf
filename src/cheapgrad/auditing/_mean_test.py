"""Is the mean of a series of draws zero?"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mean_z_scores(draws: Tensor, resolution: Tensor) -> Tensor:
    """Return how many standard errors the means of several series of draws are away from zero.

    Student's statistic is t = mean / standard error. Where the draws are skewed its tails are not Student's: a rare
    large value that happened not to come lowers the mean and the error together. Hall's (1992) transformation
    ``h(t) = t + a t²/3 + a² t³/27 + a/6``, ``a = skewness / √draws``, removes that effect to first order. The answer is
    one of t and h(t) that is nearer to zero, so that an alarm needs both.

    Args:
        draws: float64, shape ``[draws, tests]``, one series in each column.
        resolution: a mean this near to zero is forgiven as rounding.

    Returns:
        One z-score for each series; infinite where nothing varies and the mean is not zero.
    """
    mean = draws.mean(0)
    deviation = draws - mean
    standard_error = standard_errors(draws)
    skewness = deviation.pow(3).mean(0) / deviation.square().mean(0) ** 1.5
    beyond = (mean.abs() - resolution).clamp_min(0) * mean.sign()
    t = torch.where(beyond == 0, beyond, beyond / standard_error)
    a = torch.nan_to_num(skewness) / math.sqrt(len(draws))
    hall = t + a * t**2 / 3 + a**2 * t**3 / 27 + a / 6
    nearer = torch.where(hall.abs() < t.abs(), hall, t)
    corrected = torch.where(hall.sign() == t.sign(), nearer, torch.zeros_like(t))
    return torch.where(t.isinf(), t, corrected)


def standard_errors(draws: Tensor) -> Tensor:
    """Return the standard errors of the means of the columns."""
    return draws.std(0) / math.sqrt(len(draws))
