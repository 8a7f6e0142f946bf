"""From runs to pages: every figure is that of a record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.experiments.analysis import bytes_share, compare_rows, find_rivals, measure_reach, time_share
from benchmarks.experiments.datasets import load
from benchmarks.experiments.declaration import CostRun, TrainingRun, identify
from benchmarks.experiments.matching import find_time
from benchmarks.experiments.methods import EXACT, list_methods
from benchmarks.experiments.pages import fill_page, write_pages
from benchmarks.experiments.results import read_results, write_results
from benchmarks.experiments.runner import find_missing, work
from benchmarks.experiments.store import Lines, Store
from benchmarks.experiments.tables import say_winner
from benchmarks.experiments.tasks import make_perceptron_task
from benchmarks.experiments.trials import TUNING_SEEDS, Trials

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "experiments" / "results"
WANTED = ("recipes.speed(0.5)", "smaller batch, time of recipes.speed(0.5)", "Controller*")


@pytest.fixture(scope="module")
def trials():
    task = make_perceptron_task(load(None), hidden=16, epochs=1, batch_size=32)
    task = replace(task, steps=6, learning_rates=(1e-3, 1e-2), skip_small=False, evaluations=3, noise_points=1)
    return Trials((task,), list_methods(), seeds=(0, 1, 2), rounds=2, wanted=WANTED)


@pytest.fixture(scope="module")
def store(trials, tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("store"))
    assert work(trials, store) == []
    return store


@pytest.fixture(scope="module")
def results(trials, store, tmp_path_factory):
    directory = tmp_path_factory.mktemp("results")
    write_results(trials, store, "the command", directory)
    (results,) = read_results(directory)
    return results


def test_costs_come_first_then_rates_then_the_rest(trials, store):
    class Nothing:
        def find(self, identity):
            return None

        def __iter__(self):
            return iter(())

    class OnlyCosts:
        def find(self, identity):
            record = store.find(identity)
            return record if record is not None and record["declaration"]["kind"] == "costs" else None

        def __iter__(self):
            return (record for record in store if record["declaration"]["kind"] == "costs")

    assert {type(run) for run in trials.declare(Nothing())} == {CostRun}
    second = [run for run in trials.declare(OnlyCosts()) if isinstance(run, TrainingRun)]
    assert {run.seed for run in second} == set(TUNING_SEEDS)
    assert find_missing(trials, store)[0] == []
    # What rates are chosen on is never reported.
    assert {trial.run.seed for trial in trials.list_trials(store)} == {0, 1, 2}


def test_chosen_rate_is_the_best_on_the_validation_data(trials, store):
    (task,) = trials.tasks
    scores = {}
    for run in trials.declare(store):
        if isinstance(run, TrainingRun) and run.seed in TUNING_SEEDS and run.method == "exact":
            record = store.find(identify(run))
            if run.batch_size == task.batch_size:
                scores.setdefault(run.learning_rate, []).append(record["result"]["validation_accuracy"])
    assert len(scores) == 2
    best = max(scores, key=lambda rate: sum(scores[rate]))
    assert trials.choose_rate(task, EXACT, store) == best
    assert {trial.run.learning_rate for trial in trials.list_trials(store) if not trial.is_tuned} == {best}


def test_figures_are_those_of_the_records(trials, store, results):
    sketched = results.find_row("recipes.speed(0.5)")
    batch = results.find_row("smaller batch, time of recipes.speed(0.5)")
    runs = {(trial.method.label, trial.run.seed): trial.run for trial in trials.list_trials(store)}

    def look_up(row, seed):
        return store.find(identify(runs[row.label, seed]))["result"]

    differences = [
        100 * (look_up(sketched, seed)["test_accuracy"] - look_up(batch, seed)["test_accuracy"]) for seed in range(3)
    ]
    assert compare_rows(results, sketched, batch).mean == pytest.approx(sum(differences) / 3)
    assert find_rivals(results, sketched) == [batch]
    assert time_share(results, sketched) == sketched.costs["ratio"]
    method = next(method for method in trials.methods if method.label == sketched.label)
    (beside,) = trials.find_measurements(trials.tasks[0], method, store)
    assert time_share(results, batch) == pytest.approx(
        find_time(batch.declaration["batch_size"], beside["result"]["ladder"])
        if batch.declaration["batch_size"] < 32
        else 1.0
    )
    controlled = results.find_row("Controller(noise=0.05)")
    shares = [
        look_up(controlled, seed)["training_cpu_seconds"] / look_up(results.exact, seed)["training_cpu_seconds"]
        for seed in range(3)
    ]
    # What a controlled step costs is not known before it is taken.
    assert time_share(results, controlled) == pytest.approx(sum(shares) / 3)
    assert bytes_share(results, results.exact) == 1.0
    assert measure_reach(results, results.exact).steps_ratio == pytest.approx(1.0)
    assert sketched.omegas == pytest.approx([look_up(sketched, seed)["noise"][0]["omega"] for seed in range(3)])


def test_committed_records_are_enough_to_go_on_from(trials, store, tmp_path):
    (path,) = write_results(trials, store, "the command", tmp_path)
    elsewhere = Store(tmp_path / "elsewhere", [path])
    assert find_missing(trials, elsewhere)[0] == []
    again = tmp_path / "again"
    again.mkdir()
    (copy,) = write_results(trials, elsewhere, "the command", again)
    assert copy.read_text() == path.read_text()
    # Nothing that was recorded is lost when less is asked for, or when this machine has no record of its own.
    nothing = Store(tmp_path / "nothing")
    assert write_results(replace(trials, seeds=(0,)), nothing, "the command", tmp_path) == [path]
    assert {record["id"] for record in Lines(path)} == {record["id"] for record in Lines(copy)}


def test_page_says_how_much_was_not_run_and_who_makes_it(results):
    page = fill_page("# A\n<!-- experiments: tasks -->\nold\n<!-- end -->\nB", [results])
    assert "old" not in page
    assert page.startswith("# A\n")
    assert page.endswith("\nB")
    own = [row for row in results.rows if not row.is_tuned and row.is_declared]
    missing = [row for row in own if not row.runs]
    # Further budgets of published methods belong to a task whose trainings are cheaper.
    assert len(own) < len({row.label for row in results.rows})
    assert f"{len(missing)} of {len(own)} methods have not been trained" in page
    assert "`the command` trains them" in page
    assert fill_page(page, [results]) == page
    with pytest.raises(KeyError, match="weather"):
        fill_page("<!-- experiments: weather --><!-- end -->", [results])


def test_pictures_and_pages_are_written(trials, store, tmp_path):
    (tmp_path / "img").mkdir()
    (tmp_path / "results").mkdir()
    for name in ("evidence.md", "decide.md"):
        (tmp_path / name).write_text((DOCS / name).read_text())
    write_results(trials, store, "the command", tmp_path / "results")
    written = write_pages(tmp_path / "results", tmp_path)
    assert written == ["experiments_mlp_on_digits.png", "experiments_theory.png", "evidence.md", "decide.md"]
    assert (tmp_path / "img" / written[0]).read_bytes().startswith(b"\x89PNG")
    assert "recipes.speed(0.5)" in (tmp_path / "decide.md").read_text()


def test_a_winner_needs_an_interval_without_zero_and_losses_count_downwards(results):
    comparison = compare_rows(results, results.exact, results.exact)
    better = replace(comparison, mean=1.0, low=0.5, high=1.5)
    assert say_winner(results, replace(comparison, mean=1.0, low=-0.1, high=2.1)) == "no difference found"
    assert say_winner(results, better) == "the method"
    assert say_winner(replace(results, is_text=True), better) == "the one beside it"


@pytest.mark.parametrize("name", ["evidence.md", "decide.md"])
def test_the_pages_show_what_the_records_say(name):
    text = (DOCS / name).read_text(encoding="utf-8")
    assert fill_page(text, read_results(RESULTS)) == text, (
        "write the pages anew: python -m benchmarks.experiments --docs"
    )
