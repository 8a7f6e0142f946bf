"""The hand-counted memory table of randomised automatic differentiation, measured."""

from __future__ import annotations

import pytest

from benchmarks.published import BATCH, PUBLISHED, SHARES, measure_published


def test_the_bytes_measured_are_those_counted_by_hand():
    records = list(measure_published())
    assert [(one["method"], one["share"]) for one in records] == [(net, share) for net in PUBLISHED for share in SHARES]
    assert {(one["method"], one["share"]): one["ratio"] for one in records if abs(one["ratio"] - 1) > 0.02} == {}
    # One byte for each window of two poolings with 32 channels.
    windows = BATCH * 32 * (16**2 + 8**2) / 1e6
    added = [one["with_maximum_pooling"] - one["measured_megabytes"] for one in records if one["method"] == "ConvNet"]
    assert added == pytest.approx([windows] * len(SHARES))
