"""Steps of exact training that end as well: planted losses whose answer is known."""

from __future__ import annotations

import math

import pytest

from benchmarks.experiments.analysis import find_rivals, measure_equivalent, time_share
from benchmarks.experiments.tables import write_task
from tests.experiments.planted import SPEED, make_results, make_row


def shorten(steps, loss, **changes):
    label = f"fewer steps, time of {steps}"
    return make_row(label, "steps", loss=loss, steps=steps, match="another", by="time, steps", **changes)


def measure(loss, *shorter, **changes):
    """Return what the steps of a method that ends with this loss are worth; exact training ends with 1."""
    row = make_row(SPEED, "speed", loss=loss, omega=0.1, **changes)
    return measure_equivalent(make_results("ViT", [make_row("exact", "exact"), row, *shorter]), row)


@pytest.mark.parametrize(
    ("loss", "ratio"),
    [
        (1.0, 1.0),
        (1.02, 100 / 80),
        (1.04, math.sqrt(100 / 80 * 100 / 60)),
        (0.99, math.sqrt(80 / 100)),
        (1.1, math.inf),
    ],
)
def test_straight_in_the_logarithm_of_the_steps(loss, ratio):
    found = measure(loss, shorten(60, 1.06), shorten(80, 1.02))
    assert found.ratio == pytest.approx(ratio, rel=1e-6)
    assert found.low < found.ratio < found.high or math.isinf(ratio)


def test_shares_of_the_steps_are_a_ruler_and_no_rival():
    half = make_row("exact, 50 % of the steps", "steps", loss=1.04, steps=50, match="exact", by="steps, 0.5")
    assert measure(1.02, half).ratio == pytest.approx(math.sqrt(2), rel=1e-6)
    results = make_results("ViT", [make_row("exact", "exact"), half])
    assert find_rivals(results, results.exact) == []
    assert time_share(results, half) == 0.5
    assert "| 1.41 [" not in write_task(results)


def test_steps_of_its_own_count():
    assert measure(1.02, shorten(80, 1.02), shorten(60, 1.06), steps=90).ratio == pytest.approx(0.9 * 100 / 80)


def test_interval_follows_the_seeds():
    # Differences of mean 0.02 and standard deviation 0.005 over five seeds: 0.02 +- 2.776 * 0.005 / sqrt(5).
    deviations = (-1.0, -0.5, 0.0, 0.5, 1.0)
    spread = (sum(value**2 for value in deviations) / 4) ** 0.5
    exact = make_row("exact", "exact")
    losses = [
        record["result"]["test_loss"] + 0.02 + 0.005 * value / spread
        for record, value in zip(exact.runs.values(), deviations, strict=True)
    ]
    row = make_row(SPEED, "speed", loss=losses)
    found = measure_equivalent(make_results("ViT", [exact, row, shorten(50, 1.04)]), row)
    reach = 2.776445 * 0.005 / math.sqrt(5)
    assert math.log(found.high) == pytest.approx(math.log(2) * (0.02 + reach) / 0.04, rel=1e-3)
    assert math.log(found.low) == pytest.approx(math.log(2) * (0.02 - reach) / 0.04, rel=1e-3)


def test_nothing_is_known_without_shorter_trainings_that_end_worse():
    assert measure(1.02) is None
    assert measure(1.02, shorten(80, 0.99)) is None
    # Of fewer seeds than exact training, with the rate of another pass, or on another batch.
    assert measure(1.02, shorten(80, 1.02, seeds=4)) is None
    assert measure(1.02, shorten(80, 1.02, is_tuned=True)) is None
    assert measure(1.02, make_row("smaller", "batch", loss=1.02, batch=80, match="another", by="time, batch")) is None
    # One that happens to end no worse than a longer one is left out.
    assert measure(1.03, shorten(80, 1.0 - 1e-6), shorten(50, 1.06)).ratio == pytest.approx(math.sqrt(2), rel=1e-3)


def test_page_shows_what_is_beyond_the_shortest_as_unknown():
    rows = [make_row("exact", "exact"), make_row(SPEED, "speed", loss=1.1, omega=0.1), shorten(80, 1.02)]
    assert "| ? [?, ?] |" in write_task(make_results("ViT", rows))
    rows[1] = make_row(SPEED, "speed", loss=1.01, omega=0.1)
    page = write_task(make_results("ViT", rows))
    assert "| 1.12 [1.1" in page
    # Trainings of fewer steps are the ruler, and are not measured with it.
    assert "| 1.00 [" not in page
