"""Calibration measures, by hand and against a loop."""

from __future__ import annotations

import math

import pytest
import torch

from cheapgrad.curvature.laplace import expected_calibration_error, negative_log_likelihood
from cheapgrad.errors import BudgetError, ShapeError


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_the_error_is_the_sum_over_bins(bins: int) -> None:
    probabilities = torch.randn(200, 4, dtype=torch.float64).softmax(1)
    classes = torch.randint(0, 4, (200,))
    total = 0.0
    for index in range(bins):
        members = [row for row in range(200) if index / bins < float(probabilities[row].max()) <= (index + 1) / bins]
        hits = sum(int(probabilities[row].argmax()) == int(classes[row]) for row in members)
        total += abs(hits - sum(float(probabilities[row].max()) for row in members))
    assert expected_calibration_error(probabilities, classes, bins) == pytest.approx(total / 200, abs=1e-12)


def test_certainty_that_is_right_has_no_error_and_that_is_wrong_all_of_it() -> None:
    sure = torch.eye(3)
    assert expected_calibration_error(sure, torch.tensor([0, 1, 2])) == 0
    assert expected_calibration_error(sure, torch.tensor([1, 2, 0])) == 1
    assert negative_log_likelihood(sure, torch.tensor([0, 1, 2])) == 0
    assert math.isfinite(negative_log_likelihood(sure, torch.tensor([1, 2, 0])))


def test_bad_input_is_named() -> None:
    with pytest.raises(ShapeError, match=r"\(2, 3\) and \(3,\)"):
        negative_log_likelihood(torch.ones(2, 3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ShapeError, match=r"\(0, 3\) and \(0,\)"):
        expected_calibration_error(torch.ones(0, 3), torch.zeros(0, dtype=torch.long))
    with pytest.raises(BudgetError, match="got 0"):
        expected_calibration_error(torch.ones(1, 1), torch.zeros(1, dtype=torch.long), bins=0)
