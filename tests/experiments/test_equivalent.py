"""Steps of exact training that end as well: planted losses whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.experiments.analysis import compare_all, find_rivals, time_share
from benchmarks.experiments.equivalent import measure_equivalent
from benchmarks.experiments.tables import write_task
from tests.experiments.planted import SPEED, make_results, make_row

SLOPE, BEND = 0.05, 0.08


def lose(steps):
    """Return the loss of exact training of so many steps, of 100."""
    share = math.log(100 / steps)
    return 1 + SLOPE * share + BEND * share**2


def shorten(steps, loss=None, **changes):
    label = f"fewer steps, time of {steps}"
    values = {"loss": lose(steps) if loss is None else loss, "steps": steps, "match": "another", "by": "time, steps"}
    return make_row(label, "steps", **(values | changes))


def measure(loss, *shorter, **changes):
    """Return what the steps of a method that ends with this loss are worth; exact training ends with 1."""
    row = make_row(SPEED, "speed", loss=loss, omega=0.1, **changes)
    return measure_equivalent(make_results("ViT", [make_row("exact", "exact"), row, *shorter]), row)


RULER = (shorten(80), shorten(60), shorten(40))


@pytest.mark.parametrize("steps", [100, 95, 80, 70, 50, 40])
def test_ratio_is_that_of_the_training_that_ends_as_well(steps):
    found = measure(lose(steps), *RULER)
    assert found.ratio == pytest.approx(100 / steps, rel=1e-6)
    assert found.longest == pytest.approx(2.5)
    assert found.seeds == 5


def test_better_than_exact_is_read_off_the_mirror_image():
    assert measure(2 - lose(80), *RULER).ratio == pytest.approx(0.8, rel=1e-6)


def test_steps_of_its_own_count():
    assert measure(lose(80), *RULER, steps=90).ratio == pytest.approx(0.9 * 100 / 80)


def test_one_lucky_training_does_not_set_the_ruler():
    # As noisy as the least of the differences: the others hold the curve.
    lucky = measure(lose(60), shorten(80), shorten(70, lose(80)), shorten(60), shorten(40))
    assert lucky.ratio == pytest.approx(100 / 60, rel=0.1)
    assert measure(lose(60), shorten(90, 1.00001), shorten(60), shorten(40)).ratio == pytest.approx(100 / 60, rel=0.1)
    # A slope that is nothing explodes nowhere.
    assert 0.5 < measure(0.98, shorten(90, 1.00001), shorten(60), shorten(40)).ratio < 1


def test_a_training_of_hardly_fewer_steps_says_next_to_nothing():
    scatter = 0.004 * np.array([1.0, -0.5, 0.8, -1.0, 0.2])
    ruler = [shorten(steps, lose(steps) + 0.004 * np.roll([0.3, -1.0, 0.9, 0.1, -0.2], steps)) for steps in (70, 40)]
    row_loss = lose(65) + 0.002 * np.array([0.5, 1.0, -1.0, 0.3, -0.7])
    without, with_it = (measure(row_loss, *ruler, *more) for more in ([], [shorten(99, lose(99) + scatter)]))
    assert with_it.ratio == pytest.approx(without.ratio, rel=0.01)
    assert with_it.high / with_it.low == pytest.approx(without.high / without.low, rel=0.05)


def test_interval_covers_the_truth_with_scatter_in_method_and_ruler():
    generator, hits, count = np.random.default_rng(0), 0, 400
    for _ in range(count):

        def scatter(mean):
            return mean + 0.004 * generator.standard_normal(5)

        rows = [make_row("exact", "exact", loss=scatter(1.0)), make_row(SPEED, "speed", loss=scatter(lose(65)))]
        rows += [shorten(steps, scatter(lose(steps))) for steps in (80, 60, 40)]
        found = measure_equivalent(make_results("ViT", rows), rows[1])
        hits += found.low <= 100 / 65 <= found.high
    # A jackknife over five seeds of a curve that is nearly straight: 95 %, or little less.
    assert hits / count > 0.95 - 4 * math.sqrt(0.95 * 0.05 / count)
    assert hits < count


def test_interval_is_that_of_the_differences_where_the_ruler_is_certain():
    deviations = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    exact = make_row("exact", "exact", loss=np.ones(5))
    straight = [shorten(steps, np.full(5, 1 + 0.1 * math.log(100 / steps))) for steps in (70, 40)]
    row = make_row(SPEED, "speed", loss=1.04 + 0.01 * deviations)
    found = measure_equivalent(make_results("ViT", [exact, row, *straight]), row)
    reach = stats.t.ppf(0.975, 4) * 0.01 * deviations.std(ddof=1) / math.sqrt(5)
    assert math.log(found.high) == pytest.approx((0.04 + reach) / 0.1, rel=1e-6)
    assert math.log(found.low) == pytest.approx((0.04 - reach) / 0.1, rel=1e-6)


def test_nothing_is_known_without_shorter_trainings_that_end_worse():
    assert measure(1.02) is None
    assert measure(1.02, shorten(80, 0.99)) is None
    # Of fewer seeds than exact training, with the rate of another pass, or on another batch.
    assert measure(1.02, shorten(80, seeds=4)) is None
    assert measure(1.02, shorten(80, is_tuned=True)) is None
    assert measure(1.02, make_row("smaller", "batch", loss=1.02, batch=80, match="another", by="time, batch")) is None
    single = measure(lose(80), *RULER, seeds=1)
    assert single.seeds == 1
    assert math.isinf(single.high)


def test_shares_of_the_steps_are_a_ruler_and_no_rival():
    half = make_row("exact, 50 % of the steps", "steps", loss=lose(50), steps=50, match="exact", by="steps, 0.5")
    results = make_results("ViT", [make_row("exact", "exact"), half, row := make_row(SPEED, "speed", loss=lose(50))])
    assert measure_equivalent(results, row).ratio == pytest.approx(2, rel=1e-6)
    assert find_rivals(results, results.exact) == []
    assert time_share(results, half) == 0.5
    # It is no method that a p-value would have to answer for, and is not measured with itself.
    assert set(compare_all(results)) == {(SPEED, False)}
    assert [line.count("2.00 [") for line in write_task(results).splitlines() if line.startswith("| exact, 50 %")] == [
        0,
        0,
    ]


def test_page_shows_no_more_than_the_ruler_can_tell():
    def show(loss):
        rows = [make_row("exact", "exact"), make_row(SPEED, "speed", loss=loss, omega=0.1), *RULER]
        return write_task(make_results("ViT", rows))

    assert "| > 2.50 [> 2.50, > 2.50] |" in show(1.5)
    assert "| 1.25 [1.2" in show(lose(80))
    assert "| < 1 [< 1, < 1] |" in show(0.9)
