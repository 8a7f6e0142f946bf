"""How far predicted probabilities are from what happens."""

from __future__ import annotations

import torch
from torch import Tensor

from cheapgrad.curvature.kronecker.outputs import check_classes
from cheapgrad.errors import ProbabilityError, ShapeError, check_count, check_instance


def negative_log_likelihood(probabilities: Tensor, classes: Tensor) -> float:
    """Return the mean of ``−log p(class)``, in nats.

    Args:
        probabilities: ``[B, C]``.
        classes: whole numbers ``[B]``.

    Raises:
        ShapeError: if the two do not fit.
        ProbabilityError: if a row is not finite, has a negative entry, or does not sum to one: logits, for instance.
        TargetError: if the classes are no whole numbers from 0 to C - 1.

    Example:
        >>> negative_log_likelihood(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
        0.6931...
    """
    rows_BC = _check(probabilities, classes)
    return float(-rows_BC.gather(1, classes[:, None].long()).clamp_min(torch.finfo(rows_BC.dtype).tiny).log().mean())


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
        ProbabilityError: as for `negative_log_likelihood`.
        TargetError: as for `negative_log_likelihood`.
        BudgetError: if `bins` is no whole number of at least 1.

    Example:
        >>> sure = torch.tensor([[0.8, 0.2], [0.8, 0.2]])
        >>> round(expected_calibration_error(sure, torch.tensor([0, 1])), 4)
        0.3

    References:
        Guo et al. (2017), On calibration of modern neural networks.
    """
    rows_BC = _check(probabilities, classes)
    check_count("bins", bins)
    confidence, guess = rows_BC.double().max(1)
    # A confidence at an edge belongs to the bin below it.
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64, device=place.device)
    gaps.index_add_(0, place, (guess == classes).double() - confidence)
    return float(gaps.abs().sum() / len(classes))


def _check(probabilities: Tensor, classes: Tensor) -> Tensor:
    """Return the probabilities without a graph, or say what is wrong."""
    check_instance("probabilities", probabilities, Tensor)
    check_instance("classes", classes, Tensor)
    if probabilities.ndim != 2 or classes.shape != probabilities.shape[:1] or not len(classes):
        raise ShapeError(
            f"probabilities [B, C] and classes [B] with B of at least 1 were expected, but got the shapes "
            f"{tuple(probabilities.shape)} and {tuple(classes.shape)}"
        )
    rows_BC = probabilities.detach()
    # Sums of many rounded numbers; logits are off by far more.
    slack = 10 * torch.finfo(rows_BC.dtype).eps ** 0.5 if rows_BC.is_floating_point() else 0.0
    good = (rows_BC >= 0).all(1) & ((rows_BC.double().sum(1) - 1).abs() <= slack)
    if not good.all():
        row = int((~good).nonzero()[0])
        raise ProbabilityError(
            f"{int((~good).sum())} of {len(good)} rows are no probabilities; row {row} has entries from "
            f"{float(rows_BC[row].min()):.3g} to {float(rows_BC[row].max()):.3g} of sum "
            f"{float(rows_BC[row].double().sum()):.6g}; for logits use logits.softmax(-1)"
        )
    check_classes(classes, rows_BC.shape[1])
    return rows_BC
