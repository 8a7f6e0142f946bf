"""Further budgets of published methods: trained where that is cheap, elsewhere where a pattern asks for them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.experiments.methods import KEEPS, list_methods
from benchmarks.experiments.results import Row, read_results, write_results
from benchmarks.experiments.store import Store
from tests.experiments.test_measurements import make_trials, record_costs, record_trainings

MAIN, FURTHER = "column-row sampling 0.3", "column-row sampling 0.5"


def list_labels(trials):
    return {method.label for method in trials.list_wanted(trials.tasks[0])}


@pytest.fixture
def trials():
    return replace(make_trials(), wanted=("*",), tuned="none")


def test_our_own_strategies_and_uniform_rows_have_all_budgets_everywhere(trials):
    swept = {method.label for method in list_methods() if method.is_swept}
    assert FURTHER in swept
    assert "largest rows without weights 0.1 (biased)" in swept
    assert {label for label in swept if "0.3" in label} == set()
    families = ("recipes.speed({})", "recipes.both(4, {})", "cotangent examples {}", "uniform masks, rows {}")
    everywhere = {family.format(keep) for family in families for keep in KEEPS}
    assert everywhere.isdisjoint(swept)
    assert everywhere | {MAIN} <= list_labels(trials)
    assert list_labels(trials).isdisjoint(swept)


def test_they_are_trained_where_that_is_cheap_or_where_a_pattern_asks(trials):
    (task,) = trials.tasks
    cheap = replace(trials, tasks=(replace(task, sweeps=True),))
    assert list_labels(cheap) == {method.label for method in list_methods()}
    asked = replace(trials, wanted=("column-row*",))
    assert list_labels(asked) == {"exact", *(f"column-row sampling {keep}" for keep in KEEPS)}
    assert FURTHER in list_labels(replace(trials, wanted=("*", FURTHER)))


def test_results_hold_what_was_asked_for_and_say_what_belongs_to_the_task(trials, tmp_path):
    trials = replace(trials, wanted=(MAIN, FURTHER))
    store = Store(tmp_path / "store")
    record_costs(trials, store, 0, 0.5)
    record_trainings(trials, store)
    write_results(trials, store, "command", tmp_path)
    (results,) = read_results(tmp_path)
    rows: dict[str, Row] = {row.label: row for row in results.rows}
    assert [rows[label].is_declared for label in (MAIN, FURTHER)] == [True, False]
    assert rows[FURTHER].runs
