"""Steps read off smaller batches: exact where noise is that of a batch, and wrong where it is not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks.experiments.analysis import compare_all, find_rivals, time_share
from benchmarks.experiments.judges import judge_batches_theory
from benchmarks.experiments.matching import Size, match
from benchmarks.experiments.methods import list_methods
from benchmarks.experiments.pictures import draw_predictions
from benchmarks.experiments.predictions import list_predictions, write_predictions
from benchmarks.experiments.smaller_batches import read_batch_curve
from tests.experiments.planted import UNIFORM, make_results, make_row, weigh

HALF, QUARTER = (f"exact, {share} % of the batch" for share in (50, 25))


def lose(ratio):
    """Return the loss after so many times fewer steps of exact training."""
    return 1 + 0.1 * math.log(ratio)


def make_batch(percent, ratio, **changes):
    """Return exact training on smaller batches, worth so many times fewer steps."""
    label, share = f"exact, {percent} % of the batch", f"batch, {percent / 100}"
    return make_row(label, "batch", loss=lose(ratio), batch=percent, match="exact", by=share, **changes)


def make(*batches, omega, ratio, seeds=5):
    """Return a task where a method of so much noise is worth so many times fewer steps."""
    ruler = [
        make_row(f"{x} steps", "steps", loss=lose(100 / x), steps=x, match="exact", by=f"steps, 0.{x}")
        for x in (70, 40)
    ]
    method = make_row(UNIFORM, "uniform rows", loss=lose(ratio), omega=omega, seeds=seeds)
    point = {
        "step": 50,
        "methods": {"exact": weigh(0, 0, 0, None, None), UNIFORM: weigh(omega / 10, 0, omega, None, None)},
    }
    rows = [make_row("exact", "exact"), method, *ruler, *batches]
    return replace(make_results("ViT", rows), weighed=(point,))


def find_method(results):
    return next(each for each in list_predictions(results) if each.row.label == UNIFORM)


def test_prediction_is_that_of_the_batch_with_as_much_noise():
    results = make(make_batch(50, 1.5), make_batch(25, 1.8), omega=1.0, ratio=1.7)
    found = find_method(results)
    # Half the batch has as much noise again; the bound, where noise decides, says 2.
    assert found.predicted_batches == pytest.approx(1.5, rel=0.02)
    assert found.predicted_adamw == pytest.approx(2.0)
    assert found.measured.ratio == pytest.approx(1.7, rel=0.02)
    half = next(each for each in list_predictions(results) if each.row.label == HALF)
    # It is a prediction of the bound, and none of what it is read off itself.
    assert (half.predicted_adamw, half.predicted_batches) == (pytest.approx(2.0), None)
    assert "| 0.1 | 1 | 1.10 | 2.00 | 1.50 | 1.7" in write_predictions([results])
    assert draw_predictions([results]).startswith(b"\x89PNG")


def test_batches_that_say_nothing_make_no_curve():
    assert read_batch_curve(make(omega=1.0, ratio=1.5)) is None
    assert find_method(make(omega=1.0, ratio=1.5)).predicted_batches is None
    beyond = make_batch(50, 3.0)
    assert read_batch_curve(make(beyond, omega=1.0, ratio=1.5)) is None
    # One that ends no worse costs nothing; the next one still counts.
    curve = read_batch_curve(make(make_batch(50, 0.9), make_batch(25, 1.4), omega=1.0, ratio=1.5))
    assert [noise for noise, _ in curve.points] == [1, 2, 4]
    assert [ratio for _, ratio in curve.points] == pytest.approx([1, 1, 1.4], rel=0.02)
    assert curve.points[1][1] == 1


@pytest.mark.parametrize(
    ("omega", "ratio", "is_reached", "words"),
    [
        (1.0, 1.5, True, "1 of them predicted"),
        (1.0, 1.9, False, "measured ÷ predicted 1.2"),
        # The bound would be right, and the batch is not.
        (1.0, 2.0, False, "measured ÷ predicted 1.3"),
        (0.02, 1.0, False, "0 of them predicted"),
        (1.0, 3.0, False, "beyond the ruler although predicted within it: uniform masks, rows 0.3 (predicted 1.5"),
    ],
)
def test_theory_of_batches_is_judged(omega, ratio, is_reached, words):
    found = judge_batches_theory(make(make_batch(50, 1.5), make_batch(25, 2.25), omega=omega, ratio=ratio))
    assert (found.is_reached, found.seeds) == (is_reached, 5)
    assert words in found.text
    assert judge_batches_theory(make(omega=omega, ratio=ratio)) is None


def test_smaller_batches_are_a_ruler_and_no_rival():
    results = make(half := make_batch(50, 1.5), omega=1.0, ratio=1.5)
    assert find_rivals(results, results.exact) == []
    assert time_share(results, half) == 0.5
    assert set(compare_all(results)) == {(UNIFORM, False)}


def test_declared_batches_take_as_many_steps():
    declared = {each.label: each.match for each in list_methods() if each.is_ruler}
    assert {HALF, QUARTER} <= set(declared)
    sizes = [
        match(declared[label].by, Size(64, 100), ratio=1.0, ladder=[], bytes_share=1.0) for label in (HALF, QUARTER)
    ]
    assert sizes == [Size(32, 100), Size(16, 100)]
