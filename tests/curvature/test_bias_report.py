"""The bias report: verdicts, text, picture."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from cheapgrad.curvature import DenseOperator, MeanOperator
from cheapgrad.curvature._confidence import student_quantile
from cheapgrad.curvature.bias_report import BiasReport, bias_report
from cheapgrad.errors import BudgetError, MissingExtraError

WHOLE = {"population_size": 40}


def covariance(rows_BP):
    return rows_BP.T @ rows_BP / len(rows_BP)


def batches(examples, parameters=10, parts=10):
    a = covariance(torch.randn(examples, parameters, dtype=torch.float64))
    rows = torch.randn(parts, 40, parameters, dtype=torch.float64)
    return a, MeanOperator([DenseOperator(covariance(part), example_count=40) for part in rows])


def test_finds_the_bias_of_a_small_batch_at_both_ends():
    a, b = batches(20)
    top = bias_report(a, b, 3)
    assert [row.verdict for row in top.rows] == ["too large"] * 3
    assert top.overstatement > 1.5
    bottom = bias_report(a, b, 3, largest=False)
    assert [row.verdict for row in bottom.rows] == ["too small"] * 3
    assert bottom.overstatement < 0.6


def test_no_false_alarms_where_there_is_no_bias():
    """Directions of a batch so large that it is all data: at most one report in twenty may see a bias."""
    alarms = 0
    for _ in range(100):
        a, b = batches(100_000, parameters=4)
        alarms += any(row.verdict != "not seen" for row in bias_report(a, b, 4).rows)
    assert alarms <= 12


def test_rows_agree_with_each_other_and_survive_json():
    report = bias_report(*batches(20), 4, level=0.9)
    for row in report.rows:
        half = student_quantile(0.9, 9) * row.standard_error
        assert (row.low, row.high) == pytest.approx((row.corrected - half, row.corrected + half))
        assert row.overstatement == pytest.approx(row.same_batch / row.corrected)
        assert row.corrected == row.held_out
    assert BiasReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    lines = str(report).splitlines()
    assert "90% interval" in lines[0]
    assert len(lines) == 6
    assert f"same batch ÷ corrected = {report.overstatement:.3g}" in lines[-1]


def test_one_micro_batch_gives_no_verdict_and_says_so():
    report = bias_report(torch.diag(torch.tensor([9.0, 1.0])), torch.eye(2), 2)
    assert [row.verdict for row in report.rows] == ["not seen", "not seen"]
    assert report.rows[0].low is None
    assert "no intervals and no verdicts" in str(report)
    assert json.dumps(report.to_dict(), allow_nan=False)
    assert report.draw().startswith(b"\x89PNG")


def test_a_population_that_is_used_up_needs_no_micro_batches():
    rows = torch.randn(40, 6, dtype=torch.float64)
    report = bias_report(*(DenseOperator(covariance(part), example_count=20) for part in rows.split(20)), 2, **WHOLE)
    assert [(row.low, row.high) for row in report.rows] == [(row.corrected, row.corrected) for row in report.rows]
    assert [row.verdict for row in report.rows] == ["too large", "too large"]
    assert "no intervals" not in str(report)
    assert json.dumps(report.to_dict(), allow_nan=False)


def test_ratio_is_left_out_where_it_means_nothing():
    report = bias_report(torch.diag(torch.tensor([9.0, 1.0])), -torch.eye(2), 2)
    assert report.rows[0].overstatement is None
    assert report.overstatement is None
    assert "not defined" in str(report)


def test_picture():
    assert bias_report(*batches(20), 4).draw().startswith(b"\x89PNG")


def test_quantiles_are_those_of_student():
    scipy_stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 3, 8, 31, 1999, 50_000):
        for level in (0.5, 0.95, 0.9999):
            assert student_quantile(level, degrees) == pytest.approx(
                scipy_stats.t.ppf((1 + level) / 2, degrees), rel=1e-4
            )


def test_bad_input(monkeypatch):
    with pytest.raises(BudgetError, match=r"level must be in \(0, 1\), but got 0"):
        bias_report(torch.eye(2), 2 * torch.eye(2), 1, level=0)
    report = bias_report(torch.eye(2), 2 * torch.eye(2), 1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cheapgrad\[report\]'"):
        report.draw()
