"""Advice follows from the records: planted results, whose conclusions are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from benchmarks.experiments.analysis import compare_rows, find_rival
from benchmarks.experiments.choices import (
    Verdict,
    judge_setting,
    list_faster,
    write_memory_choice,
    write_situations,
    write_time_choice,
)
from benchmarks.experiments.remedies import write_remedies
from benchmarks.experiments.tables import say_winner
from tests.experiments.planted import BATCH, MEMORY, SPEED, add, make_results, make_row, make_setting, make_task


def read_advice(results, shortage):
    (line,) = (line for line in write_situations([results]).splitlines() if f"{shortage} is short" in line)
    return line.split(" | ")[1:]


@pytest.mark.parametrize(
    ("changes", "advice", "because"),
    [
        ({}, f"`{SPEED}`", "better than the smaller batch; fewer steps not run"),
        ({"fewer": 0.975}, f"`{SPEED}`", "better than both"),
        ({"fewer": 0.985}, f"a smaller batch, or `{SPEED}`", "not better than both beyond doubt"),
        ({"fewer": 0.995}, "a smaller batch, or fewer steps", "an exact method of equal time is better"),
        ({"smaller": 0.985}, f"a smaller batch, or `{SPEED}`", "not better than both beyond doubt"),
        ({"smaller": 0.995}, "a smaller batch, or fewer steps", "an exact method of equal time is better"),
        ({"time": 0.97}, "a smaller batch, or fewer steps", "no setting makes a step faster"),
    ],
)
@pytest.mark.parametrize("kind", ["ViT", "language model"])
def test_advice_on_time_follows_the_comparison(kind, changes, advice, because):
    what, reason, *_ = read_advice(make_task(kind, **changes), "time")
    assert what == advice
    assert reason.startswith(because)


def test_more_bytes_than_exact_are_said():
    results = make_task("ViT")
    heavy = make_results("ViT", [results.rows[0], *make_setting(SPEED, held=150, omega=0.1)])
    assert "holds 1.50 of the bytes, more than exact training" in read_advice(heavy, "time")[1]
    assert "more than exact" not in read_advice(results, "time")[1]


def test_what_is_worse_by_itself_is_worse_and_what_is_better_by_itself_may_be_luck():
    # p = 0.02, each by itself; with four comparisons Holm's is 0.06 at least.
    ahead = np.array([0.004, 0.001, 0.003, 0.002, 0.0005])
    assert 0.0125 < stats.ttest_1samp(ahead, 0).pvalue < 0.05
    verdicts = []
    for sign in (1, -1):
        rows = [make_row("exact", "exact")]
        for number in range(4):
            values = 0.9 + np.array([0.001, -0.002, 0.002, -0.001, 0.0])
            moved = values + sign * ahead * (1 if number == 0 else np.array([1, -1, 1, -1, 0]))
            rows += make_setting(f"setting {number}", accuracy=moved, smaller=values, omega=0.1)
        results = make_results("ViT", rows)
        verdicts.append(judge_setting(results, list_faster(results)[0]))
    assert verdicts == [Verdict.OPEN, Verdict.WORSE]


def test_advice_holds_its_level_over_many_settings():
    generator, simulations, settings = np.random.default_rng(3), 150, 6
    recommended = naive = 0
    for _ in range(simulations):
        rows = [make_row("exact", "exact")]
        for number in range(settings):
            values = 0.9 + 0.01 * generator.standard_normal((2, 5))
            rows += make_setting(f"setting {number}", accuracy=values[0], smaller=values[1], omega=0.1)
        results = make_results("ViT", rows)
        verdicts = [judge_setting(results, row) for row in list_faster(results)]
        recommended += Verdict.BETTER_THAN_ONE in verdicts
        naive += any("the method" in line for line in _say_each(results))
    allowed = stats.binom.ppf(1 - 1e-6, simulations, 0.025)
    assert recommended <= allowed < naive


def _say_each(results):
    """Return what the intervals say, each by itself."""
    return [say_winner(results, compare_rows(results, row, find_rival(results, row))) for row in list_faster(results)]


def test_advice_on_memory_is_the_fastest_that_loses_nothing():
    advice, why = read_advice(make_task("ViT"), "memory")
    assert advice == f"`{MEMORY}`"
    assert why.strip(" |").endswith("Not run beside it: checkpoints and micro-batches")
    ways = [make_row("checkpoint each block", "checkpoints", time=1.3, held=60)]
    ways += [make_row("micro-batches", "parts", time=1.1, held=25, match=MEMORY, by="bytes, parts", unavailable="no")]
    assert "Not run" not in read_advice(add(make_task("ViT"), *ways), "memory")[1]
    assert read_advice(make_task("ViT", bytes_held=60), "memory")[0] == "not known"
    # With one seed no loss is ever found.
    assert read_advice(make_task("ViT", seeds=1), "memory")[0] == "not known"


def test_no_setting_is_shown_without_its_smaller_batch():
    task = make_task("ViT")
    alone = replace(task, rows=tuple(row for row in task.rows if row.label != BATCH))
    assert SPEED in write_time_choice([task])
    text = write_time_choice([alone])
    assert text == (f"Not shown, because no setting has been trained beside its smaller batch: {task.task}.")


def test_a_rate_of_its_own_that_is_the_same_adds_no_line():
    task = make_task("ViT", fewer=0.97)
    tuned = [replace(row, is_tuned=True) for row in task.rows if row.label in (SPEED, BATCH)]
    both = add(task, *tuned)
    assert len(list_faster(both)) == 1
    (line,) = (line for line in write_time_choice([both]).splitlines() if line.startswith("| ViT"))
    assert f"{SPEED}<br>= {SPEED}, own rate" in line
    assert line.count("5 seeds") == 3


def test_tasks_that_are_not_shown_are_named_and_why():
    large, small = make_task("ViT"), make_task("ViT", data="digits")
    small = replace(small, task="ViT on digits")
    untrained = replace(make_results("BagNet", [make_row("exact", "exact", seeds=0)]), task="BagNet on digits")
    text = write_situations([large, small, untrained])
    assert "Not shown, because no training has been recorded: BagNet on digits." in text
    assert "Not shown, because a larger network of the same kind is: ViT on digits." in text
    assert "BagNet on digits" in write_memory_choice([large, untrained]).splitlines()[-1]


def test_remedies_stand_beside_what_they_mend():
    task = make_task("ViT")
    assert write_remedies([task]) == ""
    remedy = make_setting(f"{SPEED}, last 20 % exact", time=0.5, omega=0.02, exact_share=0.2)
    page = write_remedies([add(task, *remedy)])
    tried, _, _, _, plain, _, mended = page.splitlines()
    assert tried.startswith("Tried: exact gradients for the last fifth (ViT on data). Not tried yet: exact gradients")
    assert plain.split(" | ")[1:3] == [SPEED, "0.60"]
    # A fifth of the steps in full, the others in half the time.
    assert mended.split(" | ")[1:3] == [remedy[0].label, "0.60"]


def test_a_baseline_of_a_remedy_is_no_trial_of_it():
    # As when it shares its runs with the baseline of something else.
    baseline = make_setting(f"{SPEED}, last 20 % exact")[1]
    assert write_remedies([add(make_task("ViT"), baseline)]) == ""


def test_a_remedy_that_is_the_plain_setting_is_in_the_table_it_is_said_to_be_in():
    task = make_task("ViT")
    own = next(replace(row, is_tuned=True) for row in task.rows if row.label == SPEED)
    page = write_remedies([add(task, own)])
    assert "a learning rate of its own (ViT on data)" in page
    assert f"{SPEED}<br>= {SPEED}, own rate" in page
