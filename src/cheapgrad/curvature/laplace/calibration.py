"""How far predicted probabilities are from what happens."""

from __future__ import annotations

import torch
from torch import Tensor

from cheapgrad.errors import ShapeError, check_count


def negative_log_likelihood(probabilities: Tensor, classes: Tensor) -> float:
    """Return the mean of ``−log p(class)``, in nats.

    Args:
        probabilities: ``[B, C]``.
        classes: whole numbers ``[B]``.

    Raises:
        ShapeError: if the two do not fit.

    Example:
        >>> negative_log_likelihood(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
        0.6931...
    """
    _check(probabilities, classes)
    return float(
        -probabilities.gather(1, classes[:, None]).clamp_min(torch.finfo(probabilities.dtype).tiny).log().mean()
    )


def expected_calibration_error(probabilities: Tensor, classes: Tensor, bins: int = 15) -> float:
    """Return ``Σ_bins share · |accuracy − mean confidence|`` over bins of equal width of the top probability.

    Args:
        probabilities: ``[B, C]``.
        classes: whole numbers ``[B]``.
        bins: how many, at least 1.

    Law:
        Biased upwards on finite data, where a perfectly calibrated classifier has about ``√(bins / B)`` times a
        constant. To be compared at equal B and bins only.

    Raises:
        ShapeError: if the two do not fit.
        BudgetError: if `bins` is no whole number of at least 1.

    Example:
        >>> sure = torch.tensor([[0.8, 0.2], [0.8, 0.2]])
        >>> round(expected_calibration_error(sure, torch.tensor([0, 1])), 4)
        0.3

    References:
        Guo et al. (2017), On calibration of modern neural networks.
    """
    _check(probabilities, classes)
    check_count("bins", bins)
    confidence, guess = probabilities.double().max(1)
    # A confidence at an edge belongs to the bin below it.
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64, device=place.device)
    gaps.index_add_(0, place, (guess == classes).double() - confidence)
    return float(gaps.abs().sum() / len(classes))


def _check(probabilities: Tensor, classes: Tensor) -> None:
    if probabilities.ndim != 2 or classes.shape != probabilities.shape[:1] or not len(classes):
        raise ShapeError(
            f"probabilities [B, C] and classes [B] with B of at least 1 were expected, but got the shapes "
            f"{tuple(probabilities.shape)} and {tuple(classes.shape)}"
        )
