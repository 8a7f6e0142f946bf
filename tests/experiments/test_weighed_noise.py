"""Noise in units of an optimizer's steps: against the variance of AdamW's own, and where one layer hides it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.experiments.datasets import load
from benchmarks.experiments.judges import judge_weighed_theory
from benchmarks.experiments.methods import EXACT, list_methods
from benchmarks.experiments.noise import measure_noise
from benchmarks.experiments.pictures import draw_predictions
from benchmarks.experiments.predictions import list_predictions, write_predictions
from benchmarks.experiments.preparing import prepare
from benchmarks.experiments.results import read_results, write_results
from benchmarks.experiments.runner import work
from benchmarks.experiments.store import Store
from benchmarks.experiments.tasks import make_perceptron_task
from benchmarks.experiments.training import draw_batches, make_optimizer, rate_share
from benchmarks.experiments.trials import WEIGHED, Trials
from benchmarks.experiments.weighed_noise import measure_weighed_noise, weigh_noise
from tests.experiments.planted import UNIFORM, make_results, make_row, make_setting, weigh


def mean_squares(exact):
    return [torch.stack(parts).square().mean(0) for parts in zip(*exact, strict=True)]


def spread(mean, deviation):
    """Return gradients of two batches: their variance is twice the squared deviation."""
    return [[mean - deviation], [mean + deviation]]


def test_variance_of_the_steps_that_adamw_takes():
    """AdamW itself makes its second moments, from gradients that have the noise in them."""
    torch.manual_seed(0)
    mean = torch.tensor([0.9, 1e-2, 3e-5, 0.0]).double()
    deviation = torch.tensor([0.5, 3e-3, 2e-5, 1e-3]).double()
    added = torch.tensor([0.1, 3e-4, 0.0, 2e-6]).double()
    copies, steps, beta = 3000, 400, 0.98

    def take_steps(noise, last):
        """Return the steps that copies of the parameters take at last, without momentum, and the second moments."""
        parameter = torch.nn.Parameter(torch.zeros(copies, 4, dtype=torch.float64))
        optimizer = torch.optim.AdamW([parameter], lr=1.0, betas=(0.0, beta), weight_decay=0.0)
        for step in range(steps):
            gradient = mean + deviation * torch.randn_like(parameter) + noise.sqrt() * torch.randn_like(parameter)
            parameter.grad = gradient if step < steps - 1 else last
            before = parameter.detach().clone()
            optimizer.step()
        moments = optimizer.state[parameter]["exp_avg_sq"] / (1 - beta**steps)
        return parameter.detach() - before, moments.mean(0)

    shaken = torch.zeros(copies, 4).double()
    variances = [
        float(take_steps(added, scale * torch.randn_like(shaken))[0].var(0).sum())
        for scale in (added.sqrt(), deviation)
    ]
    _, moments = take_steps(torch.zeros(4).double(), shaken)
    # Two batches that have exactly this variance.
    found = weigh_noise(spread(mean, deviation / 2**0.5), [added], [moments], epsilon=1e-8)
    # Moments of some fifty gradients scatter, and 1/v is curved.
    assert found.omega_adamw == pytest.approx(variances[0] / variances[1], rel=0.08)
    assert abs(found.omega / found.omega_adamw - 1) > 0.3
    blind = weigh_noise(spread(mean, deviation / 2**0.5), [added], mean_squares(spread(mean, deviation)), 1e-8)
    assert blind.omega == found.omega


def test_a_layer_of_most_variance_hides_the_others():
    head, body = torch.full((10,), 3.0), torch.full((90,), 0.3)
    exact = [[-head, -body], [head, body]]
    found = weigh_noise(exact, [torch.zeros(10), torch.full((90,), 0.09)], mean_squares(exact), epsilon=0.0)
    assert (found.largest, found.its_share) == (0, pytest.approx(180 / (180 + 16.2)))
    assert found.omega == pytest.approx(8.1 / 196.2)
    assert found.omega_of_others == pytest.approx(0.5)
    # v + s of the second: 0.09 + 0.09 an entry; of the first: 9.
    assert found.omega_adamw == pytest.approx((90 * 0.5) / (10 * 2 + 90 * 1.0))


def test_alike_where_all_entries_are_alike_and_the_signal_is_that_of_the_expectation():
    torch.manual_seed(1)
    exact = [[1 + 2 * torch.randn(20000)] for _ in range(12)]
    found = weigh_noise(exact, [torch.full((20000,), 0.8)], [torch.full((20000,), 5.0)], epsilon=0.0)
    assert found.omega == pytest.approx(0.2, rel=0.02)
    # The squared mean of twelve has a twelfth of the variance in it: 4 / (1 + 4 / 12) = 3 would be wrong.
    assert found.noise_to_signal == pytest.approx(4, rel=0.05)
    assert found.noise_to_signal_adamw == pytest.approx(found.noise_to_signal)
    without = weigh_noise(spread(torch.zeros(5), torch.ones(5)), [torch.ones(5)], [torch.ones(5)], 0.0)
    assert without.noise_to_signal == float("inf")


def test_an_entry_whose_exact_gradient_is_zero_is_not_infinitely_noisy():
    exact = [[torch.zeros(1), -torch.ones(3)], [torch.zeros(1), torch.ones(3)]]
    moments = [torch.full((1,), 1e-20), torch.ones(3)]
    found = weigh_noise(exact, [torch.full((1,), 1e-6), torch.full((3,), 0.5)], moments, epsilon=1e-8)
    # One such entry counts as one, and no more.
    assert found.omega_adamw == pytest.approx((1 + 3 * 0.5 / 1.5) / (3 * 2 / 1.5), rel=1e-3)


@pytest.fixture
def trials():
    task = make_perceptron_task(load(None), hidden=64, epochs=1, batch_size=32)
    task = replace(task, skip_small=False, noise_points=0, evaluations=1, steps=4, learning_rates=(1e-3,))
    return Trials((task,), list_methods(), seeds=(), wanted=(WEIGHED,))


def test_noise_is_that_of_the_method_at_the_weights_of_exact_training(trials, monkeypatch):
    monkeypatch.setattr(Trials, "choose_rate", lambda self, task, method, records: 1e-2)
    (task,) = trials.tasks
    uniform = next(method for method in trials.methods if method.label == "uniform masks, rows 0.5")
    run, other = trials.list_noise_runs(task, None)
    assert set(run.methods) > {"exact", uniform.step_words}
    # A group of its own, measured at the same weights.
    assert set(run.methods) & set(other.methods) == {"exact"}
    assert replace(other, methods=run.methods) == run
    run = replace(run, methods=("exact", uniform.step_words), points=(0.5,), draws=20)
    found = trials.execute(run)["points"][0]
    assert found["step"] == 2
    assert found["methods"]["exact"]["omega"] == found["methods"]["exact"]["omega_adamw"] == 0

    model = task.build_seeded(0)
    optimizer = make_optimizer(model, 1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, 4))
    batches = draw_batches(task, 32, 0)
    for _ in range(2):
        optimizer.zero_grad()
        task.compute_loss(model, *next(batches)).backward()
        optimizer.step()
        schedule.step()
    others = draw_batches(task, 32, 5000 + 2)
    assert run.batches == len(task.dataset.train) // 32 // 2
    expected = measure_noise(prepare(task, uniform, model, []), [next(others) for _ in range(run.batches)], draws=20)
    assert found["methods"][uniform.step_words]["omega"] == pytest.approx(expected["omega"], rel=0.1)
    assert found["methods"][uniform.step_words]["noise_to_signal"] == pytest.approx(
        expected["mini_batch_variance"] / expected["squared_gradient"], rel=1e-4
    )


def test_weights_of_the_model_are_not_touched_by_what_is_measured(trials, monkeypatch):
    monkeypatch.setattr(Trials, "choose_rate", lambda self, task, method, records: 1e-2)
    (task,) = trials.tasks
    run = replace(trials.list_noise_runs(task, None)[0], batches=2)
    alone = measure_weighed_noise(task, [EXACT], run)
    beside = trials.execute(run)
    assert beside["points"][1]["methods"]["exact"] == alone["points"][1]["methods"]["exact"]


def test_methods_of_all_groups_are_read_back_at_each_point(trials, tmp_path):
    trials = replace(trials, seeds=(0,), rounds=2)
    store = Store(tmp_path / "store")
    assert work(trials, store) == []
    write_results(trials, store, "the command", tmp_path)
    (path,) = tmp_path.glob("*.jsonl")
    (results,) = read_results(tmp_path)
    runs = trials.list_noise_runs(trials.tasks[0], store)
    assert len(runs) == 2
    assert len(results.weighed) == len({point["step"] for point in results.weighed})
    for point in results.weighed:
        assert set(point["methods"]) == {words for run in runs for words in run.methods}
    # A file from before there were several runs names one.
    head, *lines = path.read_text().splitlines()
    first = json.loads(head)["weighed"][0]
    path.write_text("\n".join([json.dumps({**json.loads(head), "weighed": first}), *lines]) + "\n")
    (results,) = read_results(tmp_path)
    assert {words for point in results.weighed for words in point["methods"]} == set(runs[0].methods)


def test_it_is_made_only_where_it_is_wanted(trials, monkeypatch):
    monkeypatch.setattr(Trials, "choose_rate", lambda self, task, method, records: 1e-2)
    assert replace(trials, wanted=("recipes.*",)).list_noise_runs(trials.tasks[0], None) == []
    monkeypatch.setattr(Trials, "choose_rate", lambda self, task, method, records: None)
    assert trials.list_noise_runs(trials.tasks[0], None) == []


def test_predictions_follow_from_noise_in_both_units():
    # What the method itself has as noise and signal does not count: 5 and 7 are in no prediction.
    methods = {"exact": weigh(0, 0, 0, 1.0, None), UNIFORM: weigh(0.5, 0.8, 1.0, 5.0, 7.0)}
    shorter = make_row("fewer steps", "steps", loss=1.1, steps=40, match="another", by="time, steps")
    setting = make_setting("recipes.speed(0.5)", time=0.8, smaller=0.975, omega=0.1)
    uniform = make_row(UNIFORM, "uniform rows", loss=1.05, omega=0.5)
    rows = [make_row("exact", "exact"), *setting, uniform, shorter]
    results = replace(make_results("ViT", rows), weighed=({"step": 50, "methods": methods},))
    found = {each.row.label: each for each in list_predictions(results)}
    # Of the recipe nothing was weighed; fewer steps are what is measured with.
    assert set(found) == {UNIFORM, "smaller batch, time of recipes.speed(0.5)"}
    ours = found[UNIFORM]
    # (sqrt(2.5) + sqrt(1.5))^2 / (sqrt(2) + 1)^2 where noise and signal are alike; 1 + omega where noise decides.
    assert ours.predicted == pytest.approx((2.5**0.5 + 1.5**0.5) ** 2 / (2**0.5 + 1) ** 2)
    assert ours.predicted_adamw == pytest.approx(2.0)
    assert ours.measured.ratio == pytest.approx(2.5**0.5, rel=1e-3)
    batch = found["smaller batch, time of recipes.speed(0.5)"]
    assert batch.omega == batch.omega_adamw == (0.25,)
    assert batch.predicted_adamw == pytest.approx(1.25)
    page = write_predictions([results])
    assert "| ViT on data | uniform masks, rows 0.3 | 0.5 | 1 | 1.35 | 2.00 | – | 1.58 [" in page
    assert page.endswith("variance: ViT on data: `head.weight` (60 to 60 %).")
    assert write_predictions([replace(results, weighed=())]) == ""
    assert draw_predictions([results]).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("omega", "loss", "is_reached", "words"),
    [
        (0.6, 1.05, True, "measured ÷ predicted 0.99 to 0.99, 1 method, 1 of them predicted"),
        (0.3, 1.05, False, "measured ÷ predicted 1.22 to 1.22"),
        # Hardly any noise, and as many steps as exact training: nothing that could have been wrong.
        (0.05, 0.999, False, "0 of them predicted"),
        (0.6, 1.2, False, "beyond the ruler although predicted within it: uniform masks, rows 0.3 (predicted 1.60"),
        (4.0, 1.2, False, "1 beyond the ruler, as predicted"),
    ],
)
def test_weighed_theory_is_judged_by_whole_trainings(omega, loss, is_reached, words):
    methods = {"exact": weigh(0, 0, 0, None, None), UNIFORM: weigh(0.01, 0.01, omega, 1, 1)}
    shorter = make_row("fewer steps", "steps", loss=1.1, steps=40, match="another", by="time, steps")
    rows = [make_row("exact", "exact"), make_row(UNIFORM, "uniform rows", loss=loss, omega=0.01), shorter]
    results = replace(make_results("ViT", rows), weighed=({"step": 1, "methods": methods},))
    found = judge_weighed_theory(results)
    assert (found.is_reached, found.seeds) == (is_reached, 5)
    assert words in found.text
    assert judge_weighed_theory(replace(results, weighed=())) is None
    # A smaller batch tells nothing about the noise of methods.
    batch = make_row("smaller batch", "batch", loss=1.05, batch=63, match="another", by="time, batch")
    (found,) = [judge_weighed_theory(replace(results, rows=(rows[0], batch, shorter)))]
    assert not found.is_reached
    assert "0 of them predicted" in found.text


def test_both_points_of_a_training_are_shown_and_their_ratios_averaged():
    points = tuple(
        {"step": step, "methods": {"exact": weigh(0, 0, 0, None, None), UNIFORM: weigh(omega, 1, 2 * omega, 1, 1)}}
        for step, omega in ((30, 0.2), (70, 0.4))
    )
    shorter = make_row("fewer steps", "steps", loss=1.1, steps=40, match="another", by="time, steps")
    rows = [make_row("exact", "exact"), make_row(UNIFORM, "uniform rows", loss=1.05, omega=0.3), shorter]
    results = replace(make_results("ViT", rows), weighed=points)
    (found,) = list_predictions(results)
    assert (found.predicted, found.predicted_adamw) == (pytest.approx(1.3), pytest.approx(1.6))
    assert "| 0.2 to 0.4 | 0.4 to 0.8 | 1.30 | 1.60 | – |" in write_predictions([results])


def test_exact_steps_have_no_noise():
    words = "recipes.speed(0.3)"
    weighed = weigh(0.5, 0.5, 1.0, None, None)
    point = {"step": 1, "methods": {"exact": weighed, words: weighed}}
    row = make_row(f"{words}, last 20 % exact", "speed", loss=1.01, omega=0.5, words=words, exact_share=0.2)
    shorter = make_row("fewer", "steps", loss=1.1, steps=40, match="another", by="time, steps")
    (found,) = list_predictions(
        replace(make_results("ViT", [make_row("exact", "exact"), row, shorter]), weighed=(point,))
    )
    assert (found.predicted, found.predicted_adamw) == (pytest.approx(1.4), pytest.approx(1.8))
