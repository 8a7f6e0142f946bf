"""Costs that are measured again: the last measurement counts, and trainings that it would hardly change stay valid."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.experiments.datasets import load
from benchmarks.experiments.declaration import CostRun, TrainingRun, describe, identify
from benchmarks.experiments.methods import EXACT, list_methods
from benchmarks.experiments.results import read_results, write_results
from benchmarks.experiments.runner import find_missing
from benchmarks.experiments.store import Lines, Store
from benchmarks.experiments.tasks import make_perceptron_task
from benchmarks.experiments.trials import Trials

LABEL = "recipes.speed(0.5)"
BATCH = f"smaller batch, time of {LABEL}"
REMEDY = "recipes.speed(0.3), last 20 % exact"


def make_trials(measurements=1):
    task = make_perceptron_task(load(None), hidden=16, epochs=1, batch_size=100)
    return Trials((task,), list_methods(), seeds=(0,), wanted=(LABEL, BATCH, f"*{REMEDY}"), measurements=measurements)


def record_costs(trials, store, measurement, ratio):
    """Write down what a measurement would have found: a ladder without overhead, and one ratio for every method."""
    (task,) = trials.tasks
    for run in trials.list_cost_runs(task, measurement):
        costs = {words: {"ratio": ratio, "held_bytes": 50} for words in run.methods}
        methods = {**costs, EXACT.words: {"ratio": 1.0, "held_bytes": 100}}
        ladder = [[size, size / 100] for size in (10, 25, 50, 75, 100)]
        store.save(describe(run), {"methods": methods, "ladder": ladder}, {})


def record_trainings(trials, store):
    """Write down a result for every training that is wanted, learning rates first."""
    result = {"validation_loss": 1.0, "validation_accuracy": 0.5, "test_accuracy": 0.5, "noise": [], "curve": []}
    for _ in range(2):
        for run in find_missing(trials, store)[0]:
            assert isinstance(run, TrainingRun)
            store.save(describe(run), result, {"processor": "a", "torch": "2", "commit": "abc"})


def read_rows(trials, store, directory):
    directory.mkdir(exist_ok=True)
    write_results(trials, store, "command", directory)
    (results,) = read_results(directory)
    return results


def find_size(trials, store, label):
    method = next(method for method in trials.methods if method.label == label)
    size = trials.find_size(trials.tasks[0], method, store)
    assert size is not None
    return size.batch_size


@pytest.mark.parametrize(("again", "size"), [(0.63, 60), (0.57, 60), (0.66, 66), (0.4, 40)])
def test_trainings_stay_valid_within_five_percent(tmp_path, again, size):
    trials, store = make_trials(measurements=2), Store(tmp_path)
    record_costs(trials, store, 0, 0.6)
    assert find_size(trials, store, BATCH) == 60
    record_costs(trials, store, 1, again)
    assert find_size(trials, store, BATCH) == size
    method = next(method for method in trials.methods if method.label == LABEL)
    costs = trials.find_costs(trials.tasks[0], method, store)
    assert costs is not None
    assert costs["ratio"] == again


def test_a_second_measurement_is_declared_when_asked_for(tmp_path):
    store = Store(tmp_path)
    record_costs(make_trials(), store, 0, 0.6)
    once, twice = (find_missing(make_trials(count), store)[0] for count in (1, 2))
    assert not any(isinstance(run, CostRun) for run in once)
    assert {run.seed for run in twice if isinstance(run, CostRun)} == {1}
    assert len({identify(run) for run in twice}) == len(make_trials().list_cost_runs(make_trials().tasks[0]))


def test_partly_exact_trainings_take_the_time_of_both_kinds_of_steps(tmp_path):
    trials, store = make_trials(), Store(tmp_path)
    record_costs(trials, store, 0, 0.5)
    # A fifth of the steps in full, the others in half the time.
    assert find_size(trials, store, f"smaller batch, time of {REMEDY}") == 60
    # A step that is not exact is a step of the plain method, measured once.
    (task,) = trials.tasks
    words = [word for run in trials.list_cost_runs(task) for word in run.methods]
    assert len(set(words)) == len(words)


def test_how_many_steps_were_timed_decides_no_training_away(tmp_path):
    trials, store = make_trials(), Store(tmp_path)
    record_costs(trials, store, 0, 0.6)
    record_trainings(trials, store)
    before = read_rows(trials, store, tmp_path / "before")
    more = replace(trials, rounds=trials.rounds + 20)
    # As it happened: the exact step alone was timed once more, with more steps.
    (task,) = trials.tasks
    (exact,) = (run for run in more.list_cost_runs(task) if run.methods == (EXACT.words,))
    store.save(describe(exact), {"methods": {EXACT.words: {"ratio": 1.0, "held_bytes": 100}}, "ladder": []}, {})
    after = read_rows(more, store, tmp_path / "after")
    assert {row.label for row in before.rows if row.runs} == {row.label for row in after.rows if row.runs}
    assert {"exact", LABEL, BATCH} <= {row.label for row in after.rows if row.runs}
    assert after.left_out == ()
    assert find_missing(more, store)[0] == []


def test_trainings_that_no_row_has_are_named(tmp_path):
    trials, store = make_trials(measurements=2), Store(tmp_path)
    record_costs(trials, store, 0, 0.6)
    record_trainings(make_trials(), store)
    assert read_rows(trials, store, tmp_path / "rows").left_out == ()
    record_costs(trials, store, 1, 0.4)
    (left, _) = read_rows(trials, store, tmp_path / "rows").left_out
    assert left == "exact, 13 steps on batches of 60, rate 0.001, seeds 0"


def test_trainings_by_methods_that_changed_are_counted(tmp_path):
    trials, store = make_trials(), Store(tmp_path)
    record_costs(trials, store, 0, 0.6)
    record_trainings(trials, store)
    method = next(each for each in trials.methods if each.label == LABEL)
    others = [each for each in trials.methods if each.match is None or each.match.label != LABEL]
    fewer = replace(trials, methods=tuple(each for each in others if each.words != method.words))
    left = read_rows(fewer, store, tmp_path / "rows").left_out
    assert left[-1] == "trainings by methods that are not compared any more: 1"


def test_costs_of_another_batch_are_not_those_of_the_row(tmp_path):
    trials, store = make_trials(), Store(tmp_path)
    larger = replace(trials, tasks=(replace(trials.tasks[0], batch_size=400),))
    record_costs(larger, store, 0, 0.9)
    record_costs(trials, store, 0, 0.6)
    record_trainings(larger, store)
    record_trainings(trials, store)
    # Both batches are in the same file, one after the other.
    read_rows(larger, store, tmp_path / "rows")
    for wanted, ratio in ((trials, 0.6), (larger, 0.9)):
        results = read_rows(wanted, store, tmp_path / "rows")
        assert results.find_row(LABEL).costs["ratio"] == ratio


@pytest.mark.parametrize(("made", "size"), [(57, 57), (66, 60), (60, 60)])
def test_a_training_that_is_made_and_hardly_differs_in_size_stands(tmp_path, made, size):
    trials, store = make_trials(), Store(tmp_path)
    record_costs(trials, store, 0, 0.6)
    (task,) = trials.tasks
    run = TrainingRun(task.name, task.network, task.data, EXACT.words, made, 1, task.steps, 0.1, 0, task.evaluations, 3)
    store.save(describe(run), {}, {})
    assert find_size(trials, store, BATCH) == size


def test_times_of_adaptive_steps_that_were_measured_once_are_dropped(tmp_path):
    trials, store = replace(make_trials(), wanted=(LABEL, "Controller(noise=0.05)")), Store(tmp_path)
    record_costs(trials, store, 0, 2.3)
    record_trainings(trials, store)
    results = read_rows(trials, store, tmp_path / "rows")
    assert results.find_row("Controller(noise=0.05)").costs == {"held_bytes": 50, "held_share": 0.5}
    assert results.find_row(LABEL).costs["ratio"] == 2.3
    (path,) = (tmp_path / "rows").glob("*.jsonl")
    controlled = next(method.step_words for method in trials.methods if method.label == "Controller(noise=0.05)")
    costs = [record["result"]["methods"] for record in Lines(path) if record["declaration"]["kind"] == "costs"]
    assert [each[controlled] for each in costs if controlled in each] == [{"held_bytes": 50}]
