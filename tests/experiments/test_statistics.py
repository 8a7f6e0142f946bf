"""Paired comparisons against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.experiments.statistics import compare_paired, correct_for_many, summarise


@pytest.mark.parametrize("pairs", [2, 3, 4, 5, 6, 11, 30])
@pytest.mark.parametrize("shift", [0.0, 0.7, -4.0])
def test_interval_and_p_value_are_those_of_scipy(pairs, shift):
    generator = np.random.default_rng(pairs)
    first, second = generator.normal(shift, 1, pairs), generator.normal(0, 1, pairs)
    # Pairs are found by seed, not by order.
    found = compare_paired(dict(enumerate(first)), dict(reversed(list(enumerate(second)))))
    expected = stats.ttest_rel(first, second)
    interval = expected.confidence_interval(0.95)
    assert found.pairs == pairs
    assert found.mean == pytest.approx((first - second).mean(), rel=1e-12)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9, abs=1e-14)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-8)


def test_only_common_seeds_are_compared():
    found = compare_paired({0: 1.0, 1: 2.0, 7: 100.0}, {1: 1.0, 0: 0.5, 3: -100.0})
    assert (found.pairs, found.mean) == (2, 0.75)
    with pytest.raises(ValueError, match=r"\[1\] and \[2\]"):
        compare_paired({1: 0.0}, {2: 0.0})


def test_one_pair_and_equal_differences_say_what_they_know():
    single = compare_paired({0: 1.0}, {0: 0.5})
    assert (single.low, single.high) == (-math.inf, math.inf)
    assert math.isnan(single.p_value)
    assert compare_paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).p_value == 1.0
    assert compare_paired({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}).p_value == 0.0


def test_holm_against_its_definition():
    values = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "e": math.nan}
    found = correct_for_many(values)
    assert found["d"] == pytest.approx(0.02)
    assert found["a"] == pytest.approx(0.03)
    assert found["c"] == pytest.approx(0.06)
    # Never below that of a smaller p-value.
    assert found["b"] == pytest.approx(0.06)
    assert math.isnan(found["e"])


def test_mean_and_deviation():
    mean, deviation = summarise([1.0, 2.0, 6.0])
    assert (mean, deviation) == (3.0, pytest.approx(np.std([1, 2, 6], ddof=1)))
