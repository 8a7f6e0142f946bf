"""Data, matching, biased references, and training itself."""

from __future__ import annotations

import io
import itertools
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import cheapgrad
from benchmarks.experiments import costs
from benchmarks.experiments.analysis import steps_to
from benchmarks.experiments.biased import LargestWithoutWeights
from benchmarks.experiments.costs import measure_costs
from benchmarks.experiments.datasets import DataError, load, load_digit_pixels
from benchmarks.experiments.declaration import TrainingRun
from benchmarks.experiments.matching import Size, find_batch_size, find_time, match
from benchmarks.experiments.methods import EXACT, FIRST_EXACT, PLANNED_AFTER, SMALL_TOO, list_methods
from benchmarks.experiments.noise import measure_noise
from benchmarks.experiments.preparing import prepare
from benchmarks.experiments.tasks import make_bagnet_task, make_language_task, make_perceptron_task, make_quick_tasks
from benchmarks.experiments.training import draw_batches, train
from cheapgrad.sketch import ColumnSample


def make_task(**changes):
    task = make_perceptron_task(load(None), hidden=16, epochs=1, batch_size=32)
    return replace(task, steps=6, skip_small=False, evaluations=2, noise_points=1, **changes)


def declare(task, method, *, seed=0, **changes):
    run = TrainingRun(
        task.name, task.network, task.data, method.words, task.batch_size, 1, task.steps, 3e-3, seed, 2, 1
    )
    return replace(run, **changes)


def find_method(label):
    return next(method for method in list_methods() if method.label == label)


def drop_times(result):
    return {name: value for name, value in result.items() if "seconds" not in name and name != "curve"}


def test_labels_and_words_tell_methods_apart():
    methods = list_methods()
    assert len({method.label for method in methods}) == len(methods)
    unmatched = [method.words for method in methods if method.match is None]
    assert len(set(unmatched)) == len(unmatched)
    assert all(method.is_biased == ("(biased)" in method.label) for method in methods)
    labels = {method.label for method in methods}
    assert all(method.match.label in labels for method in methods if method.match)


def test_keras_table(tmp_path):
    generator = np.random.default_rng(0)
    arrays = {
        "x_train": generator.integers(0, 255, (40, 5, 4), dtype=np.uint8),
        "y_train": np.arange(40) % 3,
        "x_test": generator.integers(0, 255, (7, 5, 4), dtype=np.uint8),
        "y_test": np.arange(7) % 3,
    }
    np.savez(tmp_path / "some.npz", **arrays)
    data = load(tmp_path / "some.npz")
    assert (len(data.train), len(data.validation), len(data.test), data.classes) == (36, 4, 7, 3)
    # Nothing that learning rates are chosen on is trained on.
    rows = torch.cat([data.train.inputs, data.validation.inputs]).flatten(1)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, arrays["x_train"].reshape(40, -1).tolist()))
    assert torch.equal(data.test.inputs[:, 0], torch.from_numpy(arrays["x_test"]))
    np.savez(tmp_path / "short.npz", x_train=arrays["x_train"])
    with pytest.raises(DataError, match=r"short\.npz has .'x_train'., but lacks .*x_test"):
        load(tmp_path / "short.npz")
    np.savez(tmp_path / "real.npz", **{**arrays, "x_train": arrays["x_train"].astype(float)})
    with pytest.raises(DataError, match=r"x_train of real\.npz must be uint8"):
        load(tmp_path / "real.npz")


def test_folder_and_zip_hold_the_same(tmp_path):
    for part, count in (("train", 12), ("test", 4)):
        for number in range(count):
            path = tmp_path / "pictures" / part / "ab"[number % 2] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((3, 2, 3), 10 * number, dtype=np.uint8)).save(path)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for path in (tmp_path / "pictures").rglob("*.png"):
            archive.write(path, path.relative_to(tmp_path).as_posix())
    (tmp_path / "pictures.zip").write_bytes(content.getvalue())
    folder, archive = load(tmp_path / "pictures"), load(tmp_path / "pictures.zip")
    assert folder.fingerprint == archive.fingerprint
    assert folder.test.inputs.shape == (4, 3, 3, 2)
    # Brightness 10 number, class number % 2: examples and labels belong together.
    assert torch.equal(folder.train.inputs[:, 0, 0, 0].long() // 10 % 2, folder.train.labels)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="nothing must hold train/<class>"):
        load(tmp_path / "nothing")


def test_text_windows_follow_each_other(tmp_path):
    text = "".join(chr(97 + number * number % 26) for number in range(2000))
    (tmp_path / "some.txt").write_text(text)
    data = load(tmp_path / "some.txt", tokens=16)
    characters = sorted(set(text))
    read = "".join(characters[number] for number in data.train.inputs.flatten())
    assert text.startswith(read)
    assert torch.equal(data.train.inputs[:, 1:], data.train.labels[:, :-1])
    assert torch.equal(data.train.inputs[1:, 0], data.train.labels[:-1, -1])
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(DataError, match=r"short\.txt has 5 characters"):
        load(tmp_path / "short.txt")


@pytest.mark.parametrize(("name", "message"), [("missing.npz", "nothing at"), ("table.csv", "ends in '.csv'")])
def test_what_is_no_data_is_said(tmp_path, name, message):
    if "missing" not in name:
        (tmp_path / name).write_text("1,2")
    with pytest.raises(DataError, match=message):
        load(tmp_path / name)


def test_fingerprint_sees_a_single_label():
    digits = load(None)
    labels = digits.train.labels.clone()
    labels[5] += 1
    other = replace(digits, train=replace(digits.train, labels=labels))
    assert digits.fingerprint == load(None).fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("time, batch", Size(40, 100)),
        ("time, steps", Size(64, 60)),
        ("bytes, batch", Size(16, 400)),
        ("bytes, parts", Size(64, 100, 4)),
        ("bytes, larger batch", Size(256, 25)),
    ],
)
def test_matching(by, expected):
    # 0.6 lies half way between the steps on 32 and on 48 examples.
    ladder = [(16, 0.3), (32, 0.5), (48, 0.7), (64, 1.0)]
    assert match(by, Size(64, 100), ratio=0.6, ladder=ladder, bytes_share=0.25) == expected


def test_batches_stay_on_the_ladder_and_noise_does_not_turn_it():
    ladder = [(16, 0.3), (32, 0.28), (48, 0.7), (64, 1.0)]
    assert find_batch_size(0.1, ladder) == 16
    assert find_batch_size(2.0, ladder) == 64
    sizes = [find_batch_size(ratio / 50, ladder) for ratio in range(60)]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("noise", [0.9, 1.0, 1.1])
def test_a_step_timed_twice_does_not_turn_the_ladder(noise):
    # The last step of the ladder is the exact step once more, and the whole ladder shares its noise.
    ladder = [(size, noise * size / 64) for size in (16, 32, 64)]
    assert find_batch_size(1.0, ladder) == 64
    assert find_batch_size(0.75, ladder) == 48
    assert find_time(48, ladder) == pytest.approx(0.75)


def test_steps_to_a_target():
    curve = [{"step": step, "validation_loss": loss} for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 0.5))]
    assert steps_to(curve, 2.0) == 15.0
    assert steps_to(curve, 0.75) == pytest.approx(30 + 10 * 1.25 / 1.5)
    assert steps_to(curve, 0.4) is None
    assert steps_to(curve, 5.0) == 10.0
    assert steps_to([{"step": 10, "validation_loss": None}], 1.0) is None


def test_reference_without_weights_is_biased_and_its_error_is_the_stated_one():
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 8, dtype=torch.float64)
    x, cotangent = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    cheapgrad.approximate(
        layer, cheapgrad.Rule("*", cotangent=ColumnSample(0.5, design=LargestWithoutWeights())), skip_small=False
    )
    (layer(x) * cotangent).sum().backward()
    largest = cotangent.norm(dim=0).topk(4).indices
    expected = torch.zeros_like(layer.weight)
    expected[largest] = (cotangent.T @ x)[largest]
    torch.testing.assert_close(layer.weight.grad, expected)
    norms = (cotangent.T @ x).square().sum(1)
    stated = LargestWithoutWeights().variance(
        norms, cotangent.norm(dim=0), 4, lambda weights: (weights.unsqueeze(1) * (cotangent.T @ x)).square().sum()
    )
    torch.testing.assert_close(stated, (expected - cotangent.T @ x).square().sum())


def test_micro_batches_add_up_to_the_batch():
    task = make_task()
    batch = next(draw_batches(task, 30, 0))
    gradients = []
    for parts in (1, 4):
        model = task.build_seeded(0)
        loss = prepare(task, EXACT, model, []).backward(batch, parts)
        gradients.append((loss, [parameter.grad for parameter in model.parameters()]))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-4, atol=1e-6)


def test_a_run_is_its_declaration():
    task = make_task()
    first, again = (train(task, EXACT, declare(task, EXACT)) for _ in range(2))
    other = train(task, EXACT, declare(task, EXACT, seed=1))
    assert drop_times(first) == drop_times(again)
    assert first["test_loss"] != other["test_loss"]
    assert [point["step"] for point in first["curve"]] == [3, 6]
    assert first["held_bytes"] > 0
    assert first["peak_bytes"] > first["held_bytes"]
    assert not first["is_diverged"]


def test_checkpoints_train_the_same_and_hold_less():
    task = make_language_task(load_digit_pixels(), width=64, depth=1, epochs=1, batch_size=4)
    task, checkpoints = replace(task, steps=3), find_method("checkpoint each block")
    exact, cheap = (train(task, method, declare(task, method)) for method in (EXACT, checkpoints))
    assert cheap["test_loss"] == pytest.approx(exact["test_loss"], rel=1e-4)
    assert cheap["held_bytes"] < exact["held_bytes"]


def test_omega_of_a_sketch_is_measured_and_grows_with_what_is_dropped():
    task = make_task()
    omegas = []
    for keep in (0.5, 0.1):
        method = find_method(f"uniform masks, rows {keep}")
        (point,) = train(task, method, declare(task, method))["noise"]
        omegas.append(point["omega"])
    # Uniform rows of independent examples: 1 / keep - 1 times the raw second moment over the variance, at least.
    assert 0.5 < omegas[0] < omegas[1]
    assert train(task, EXACT, declare(task, EXACT))["noise"][0]["omega"] is None


def test_a_controller_does_not_see_what_is_measured():
    task, method = replace(make_task(), steps=12), find_method("Controller(noise=0.05)")
    watched, alone = (train(task, method, declare(task, method, noise_points=points)) for points in (12, 0))
    assert len(watched["noise"]) == 12
    # Every step is a trial here, and the next budgets follow from it.
    assert watched["test_loss"] == alone["test_loss"]
    prepared = prepare(task, method, task.build_seeded(0), [])
    before = prepared.handle.strategies()
    prepared.measure_bytes(next(draw_batches(task, 32, 0)))
    assert prepared.handle.strategies() == before
    assert all(strategy.design.trial.totals[0] == 0 for strategy in before.values())


def test_omega_of_a_controller_is_that_of_its_keeps():
    task, method = make_task(), find_method("Controller(noise=0.05)")
    batches = list(itertools.islice(draw_batches(task, 32, 0), 4))
    controlled, plain = (
        measure_noise(prepare(task, each, task.build_seeded(0), []), batches, draws=2)["omega"]
        # Before the first trial the keep fractions are those of the rules.
        for each in (method, find_method("recipes.speed(0.5)"))
    )
    assert controlled == plain


def test_exact_steps_are_exact_and_the_others_are_not():
    task, plain = make_task(), find_method("recipes.speed(0.3)")
    always, never, half = (replace(plain, exact_between=between) for between in ((0.0, 1.0), (0.5, 0.5), (0.5, 1.0)))
    losses = {
        name: train(task, method, declare(task, method))["test_loss"]
        for name, method in (("exact", EXACT), ("always", always), ("plain", plain), ("never", never), ("half", half))
    }
    assert losses["always"] == losses["exact"]
    assert losses["never"] == losses["plain"] != losses["exact"]
    assert losses["half"] not in {losses["exact"], losses["plain"]}
    assert half.exact_share == 0.5
    assert half.step_words == plain.words != half.words


def test_steps_of_adaptive_methods_are_not_timed_apart():
    task, labels = make_task(), ("recipes.speed(0.5)", "Controller(noise=0.05)", "plan(flops=0.6)")
    methods = [find_method(label) for label in labels]
    measured = measure_costs(task, methods, rounds=2, seed=0)["methods"]
    # A plan's steps are all alike, from where it is made.
    assert [("ratio" in measured[method.step_words]) for method in methods] == [True, False, True]
    assert [method.exact_share for method in methods] == [0.0, 0.0, PLANNED_AFTER]
    assert all(measured[method.step_words]["held_bytes"] > 0 for method in methods)


def test_plans_are_timed_at_weights_that_have_learned(monkeypatch):
    task = replace(make_task(), steps=50)
    seen = []

    def note(task, method, model, batches, optimizer=None):
        if method.planned_flops is not None:
            steps = [int(state["step"]) for state in optimizer.state.values()]
            seen.append((set(steps), [parameter.detach().clone() for parameter in model.parameters()]))
        return prepare(task, method, model, batches, optimizer)

    monkeypatch.setattr(costs, "prepare", note)
    measure_costs(task, [find_method("plan(flops=0.6)")], rounds=2, seed=0)
    ((steps, weights),) = seen
    assert steps == {round(PLANNED_AFTER * 50)}
    fresh = list(task.build_seeded(0).parameters())
    assert not any(torch.equal(one, other) for one, other in zip(weights, fresh, strict=True))


def test_small_layers_are_converted_where_a_method_says_so():
    task = replace(make_perceptron_task(load(None), hidden=256, epochs=1, batch_size=32), noise_points=0)
    batch = next(draw_batches(task, 32, 0))
    plain, small_too, first_exact = (
        prepare(task, find_method(label), task.build_seeded(0), [])
        for label in ("recipes.memory(4)", SMALL_TOO, FIRST_EXACT)
    )
    assert "too small to pay" in str(plain.handle)
    assert "too small to pay" not in str(small_too.handle)
    # The head held its input in 32 bits, and holds it in 4 with a scale for each group.
    difference = plain.measure_bytes(batch)[0] - small_too.measure_bytes(batch)[0]
    assert 0.75 * 4 * 32 * 256 < difference < 4 * 32 * 256 * (1 - 4 / 32)
    # Nor does the first layer hold codes of the batch, which counts as the caller's: 64 pixels in 4 bits, and scales.
    codes = small_too.measure_bytes(batch)[0] - first_exact.measure_bytes(batch)[0]
    assert 32 * 64 * 4 / 8 < codes < 32 * 64
    names, without_first = ({row.name for row in each.handle.rows} for each in (small_too, first_exact))
    assert names - without_first == {"blocks.0.0"}


@pytest.mark.parametrize("kind", ["MLP", "ViT", "BagNet", "language model"])
def test_first_layer_is_left_alone(kind):
    (task,) = (task for task in make_quick_tasks(load(None), load_digit_pixels()) if kind in task.name)
    model = task.build_seeded(0)
    prepared = prepare(task, find_method(FIRST_EXACT), model, [])
    without = {row.name for row in prepared.handle.rows}
    prepared.handle.revert()
    names = {row.name for row in prepare(task, find_method(SMALL_TOO), model, []).handle.rows}
    (first,) = names - without
    layers = [
        name for name, module in model.named_modules() if not list(module.children()) and list(module.parameters())
    ]
    assert first == layers[0]


def test_divergence_is_a_result():
    task = make_task()
    result = train(task, EXACT, declare(task, EXACT, learning_rate=1e30))
    assert result["is_diverged"]
    assert result["test_loss"] is None


@pytest.mark.parametrize("kind", ["BagNet", "language model"])
def test_other_networks_train(kind):
    if kind == "BagNet":
        task = make_bagnet_task(load(None), width=4, epochs=1, batch_size=8)
    else:
        task = make_language_task(load_digit_pixels(), width=64, depth=1, epochs=1, batch_size=4)
    task = replace(task, steps=2, skip_small=False)
    for label in ("recipes.speed(0.5)", "recipes.memory(4)"):
        method = find_method(label)
        result = train(task, method, declare(task, method, batch_size=4, evaluations=1))
        assert result["noise"][0]["omega"] is not None
        assert result["curve"][-1]["step"] == 2
