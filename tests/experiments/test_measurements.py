"""Costs that are measured again: the last measurement counts, and trainings that it would hardly change stay valid."""

from __future__ import annotations

import pytest

from benchmarks.experiments.datasets import load
from benchmarks.experiments.declaration import CostRun, describe, identify
from benchmarks.experiments.methods import EXACT, list_methods
from benchmarks.experiments.runner import find_missing
from benchmarks.experiments.store import Store
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
