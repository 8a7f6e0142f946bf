"""The band of Student's t against SciPy."""

from __future__ import annotations

import pytest
from scipy import stats

from cheapgrad.auditing import student_band
from cheapgrad.errors import BudgetError


@pytest.mark.parametrize("degrees", [1, 2, 7, 63, 255, 4095])
@pytest.mark.parametrize("probability", [0.9, 0.5, 0.05, 1e-6, 1e-12, 1e-30])
def test_equals_scipy(probability, degrees):
    assert student_band(probability, degrees) == pytest.approx(stats.t.isf(probability / 2, degrees), rel=1e-9)


@pytest.mark.parametrize("probability", [0, 1, -0.5, 2, float("nan")])
def test_probability_out_of_range(probability):
    with pytest.raises(BudgetError, match=f"got {probability!r}"):
        student_band(probability, 10)


def test_degrees_out_of_range():
    with pytest.raises(BudgetError, match="degrees must be a whole number of at least 1, but got 0"):
        student_band(0.5, 0)
