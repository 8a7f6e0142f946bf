"""The demo from beginning to end, on a network that trains in a moment."""

from __future__ import annotations

import io
import json
import multiprocessing
import sys
import time
from functools import partial

import pytest
import torch
from PIL import Image
from rich.console import Console

from cheapgrad.demo import DemoSettings, DigitsMLP, Method, run_demo
from cheapgrad.demo.setups import Setup
from cheapgrad.demo.workers import open_workers
from cheapgrad.errors import BudgetError, MissingExtraError
from cheapgrad.reporting import DemoRecord
from cheapgrad.sketch import LowRank, RowSample, StochasticRounding

TINY = Setup("tiny", "64 - 16 - 16 - 10", partial(DigitsMLP, 16), 32, 4, 1e-2, 24)
METHODS = (
    Method("rows .5", "rows", cotangent=RowSample(keep=0.5)),
    Method("rows .25", "rows", cotangent=RowSample(keep=0.25), budget=1),
    Method("4 bits", "bits", stored=StochasticRounding(bits=4)),
)


def settings(**changes):
    return DemoSettings(
        **{"seeds": 2, "draws": 16, "rounds": 1, "strategies": METHODS, "setups": (TINY,), "workers": 1, **changes}
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    stream = io.StringIO()
    record = run_demo(directory / "new", settings(), Console(file=stream, width=120))
    return directory / "new", record, stream.getvalue()


def test_files_are_left_and_nothing_else(finished):
    directory, record, _ = finished
    assert sorted(path.name for path in directory.iterdir()) == ["demo.json", "demo.png", "report.html"]
    assert DemoRecord.from_dict(json.loads((directory / "demo.json").read_text())).models == record.models
    assert Image.open(directory / "demo.png").width > 1000


def test_exact_comes_first_then_batches_then_strategies(finished):
    (model,) = finished[1].models
    assert model.methods[0].kind == "exact"
    assert [method.kind for method in model.methods][-3:] == ["strategy"] * 3
    assert [method.label for method in model.methods if method.kind == "strategy"] == ["rows .5", "rows .25", "4 bits"]
    exact = model.exact
    assert (exact.step_time_fraction, exact.held_bytes_fraction, exact.noise_fraction) == (1, 1, 0)
    assert model.parameters == 64 * 16 + 16 + 16 * 16 + 16 + 16 * 10 + 10


def test_checkpointing_holds_less_and_changes_nothing_else(finished):
    model = finished[1].models[0]
    (checkpointed,) = [method for method in model.methods if method.kind == "checkpoint"]
    assert checkpointed.held_bytes < model.exact.held_bytes
    assert checkpointed.accuracies == model.exact.accuracies
    assert (checkpointed.noise_fraction, checkpointed.max_abs_z, checkpointed.measured_relative_variance) == (0, 0, 0)


def test_layers_are_recorded(finished):
    model = finished[1].models[0]
    for method in model.methods:
        # The batch, 64 numbers an example and a class, counts by layer and not in the sum.
        batch_bytes = method.batch_size * (64 * 4 + 8)
        assert 0 < sum(entry.held_bytes for entry in method.held) - method.held_bytes <= batch_bytes
        if method.kind == "strategy":
            names = [tensor.name for tensor in method.tensors]
            assert names == [f"layers.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")]
            fractions = [tensor.noise_fraction for tensor in method.tensors]
            assert min(fractions) <= method.noise_fraction <= max(fractions)


def test_equal_batches_name_the_strategy_they_equal(finished):
    others = [method for method in finished[1].models[0].methods if method.kind != "strategy"]
    remarks = [method.remark for method in others if method.kind == "batch"]
    # One for each budget, unless both came out at the same batch size.
    assert 1 <= len(remarks) <= 2
    assert all(any(method.label in remark for method in METHODS) for remark in remarks)
    assert all(method.remark for method in others[1:])


def test_wider_network_is_timed(finished):
    wide = finished[1].wide
    assert [step.label for step in wide] == ["exact", "rows .5", "rows .25", "4 bits"]
    assert wide[0].step_time_fraction == 1


def test_every_method_was_measured(finished):
    for method in finished[1].models[0].methods:
        assert len(method.accuracies) == 2
        assert method.step_seconds > 0
        assert method.held_bytes > 0
        if method.kind == "strategy":
            assert method.draws == 16
            assert method.measured_relative_variance > 0
            assert method.predicted_relative_variance > 0
    bits = finished[1].models[0].methods[-1]
    assert bits.held_bytes_fraction < 1


def test_progress_is_told_in_a_log_too(finished):
    text = finished[2]
    for phase in ("step times", "variance and bias", "training"):
        assert f"tiny: {phase} ..." in text


def test_environment_and_seeds_are_recorded(finished):
    written = json.loads((finished[0] / "demo.json").read_text())
    assert written["seeds"] == [0, 1]
    assert written["environment"]["torch"] == torch.__version__
    assert written["provenance"]["held_bytes"].startswith("measured")
    assert written["provenance"]["predicted_relative_variance"].startswith("modelled")


def _stop_the_clock(monkeypatch, **seconds):
    """Let steps take the given seconds, by budget, and those of exact methods one second for the usual batch."""

    def time_steps(setup, methods, data, rounds, on_round):
        exact = [(method.batch_size or setup.batch_size) / setup.batch_size for method in methods]
        return [
            seconds[f"budget_{method.budget}"] if method.kind == "strategy" else share
            for method, share in zip(methods, exact, strict=True)
        ]

    monkeypatch.setattr("cheapgrad.demo.model_run.time_steps", time_steps)


def _labels(model):
    return [method.label for method in model.methods]


@pytest.mark.slow
def test_two_workers_find_what_one_finds(tmp_path, monkeypatch):
    _stop_the_clock(monkeypatch, budget_0=0.75, budget_1=1.25)
    alone, shared = (
        run_demo(tmp_path, settings(workers=workers), Console(file=io.StringIO())).models[0] for workers in (1, 2)
    )
    assert _labels(alone) == ["exact", "checkpointing", "batch of 24", "batch of 40", "rows .5", "rows .25", "4 bits"]
    # To the last bit, and for the batches too.
    assert alone == shared


def test_what_is_found_does_not_depend_on_the_clock(finished, tmp_path, monkeypatch):
    # How long steps took decides how many batches of equal step time there are; a comparison row by row would compare
    # different methods with each other.
    _stop_the_clock(monkeypatch, budget_0=1.0, budget_1=1.0)
    record = run_demo(tmp_path, settings(), Console(file=io.StringIO()))
    ((timed,), (other,)) = finished[1].models, record.models
    assert _labels(other) == ["exact", "checkpointing", "rows .5", "rows .25", "4 bits"]
    measured = {method.label: method for method in timed.methods}
    for method in other.methods:
        assert method.accuracies == measured[method.label].accuracies
        assert method.measured_relative_variance == measured[method.label].measured_relative_variance
        assert method.held_bytes == measured[method.label].held_bytes


def test_error_in_a_worker_reaches_the_caller(tmp_path):
    with open_workers(2) as workers, pytest.raises(BudgetError, match="seeds"):
        workers.run([partial(DemoSettings, seeds=0)], lambda: None)


def test_workers_end_at_once_with_an_error():
    def interrupt_long_work():
        with open_workers(2) as workers:
            workers.run([partial(int, "1")], lambda: None)
            workers._pool.submit(time.sleep, 60)
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupt_long_work()
    assert time.monotonic() - start < 30
    assert multiprocessing.active_children() == []


def test_global_state_is_left_alone(tmp_path):
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    run_demo(tmp_path, settings(seeds=1, draws=8, strategies=METHODS[:1]), Console(file=io.StringIO()))
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    assert torch.get_num_threads() == threads


def test_misfit_is_found_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("cheapgrad.demo.model_run.train_half_way", lambda setup: pytest.fail("trained"))
    misfit = (*METHODS, Method("rank", "rank", cotangent=LowRank(rank=11)))
    with pytest.raises(BudgetError, match=r"rank does not fit tiny: .*rank=11"):
        run_demo(tmp_path, settings(strategies=misfit), Console(file=io.StringIO()))
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_is_found_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cheapgrad\[demo\]'"):
        run_demo(tmp_path, settings(), Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "seeds .* got 0"),
        ({"draws": 7}, "draws .* got 7"),
        ({"rounds": 0}, "rounds .* got 0"),
        ({"workers": 0}, "workers .* got 0"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(BudgetError, match=message):
        DemoSettings(**changes)
