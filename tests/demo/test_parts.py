"""Data, methods, timing, noise and files of the demo."""

from __future__ import annotations

import itertools
import os
import stat
import sys
import threading
from functools import partial

import pytest
import torch

from cheapgrad.demo import Method, make_default_methods
from cheapgrad.demo.data import load_data
from cheapgrad.demo.methods import EXACT, check_methods
from cheapgrad.demo.models import DigitsMLP
from cheapgrad.demo.noise import NoiseMeter
from cheapgrad.demo.setups import Setup
from cheapgrad.demo.timing import find_batch_size, make_batch_ladder, time_steps
from cheapgrad.demo.training import measure_accuracy, train
from cheapgrad.environment import describe_environment
from cheapgrad.errors import BudgetError, MissingExtraError, OutputError
from cheapgrad.files import prepare_directory, prepare_file, write_whole
from cheapgrad.sketch import LowRank, RowSample

TINY = Setup("tiny", "64 - 16 - 16 - 10", partial(DigitsMLP, 16), 32, 4, 1e-2, 24)
ROWS = Method("rows", "rows", cotangent=RowSample(keep=0.5))


@pytest.fixture(scope="module")
def data():
    return load_data()


def test_data_are_split_without_overlap_and_scaled(data):
    assert (len(data.train_classes), len(data.test_classes)) == (1437, 360)
    assert data.train_pictures.shape == (1437, 8, 8)
    assert abs(float(data.train_pictures.mean())) < 0.1
    assert abs(float(data.train_pictures.std()) - 1) < 0.1
    assert data.train_classes.bincount().min() > 100
    assert data.test_classes.bincount().min() > 20


def test_batches_depend_on_the_seed_only_and_are_all_full(data):
    def first(seed, count=60):
        return [classes for _, classes in itertools.islice(data.batches(100, seed), count)]

    assert all(len(classes) == 100 for classes in first(0))
    assert all(torch.equal(one, other) for one, other in zip(first(0), first(0), strict=True))
    assert not torch.equal(first(0)[0], first(1)[0])
    # Another pass over the data comes in another order.
    assert not torch.equal(first(0)[0], first(0)[14])


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cheapgrad\[demo\]'"):
        load_data()


def test_default_methods_are_at_least_four_families_at_two_budgets():
    methods = make_default_methods()
    families = {method.family for method in methods}
    assert len(families) >= 4
    assert all([m.budget for m in methods if m.family == family] == [0, 1] for family in families)
    assert len({method.label for method in methods}) == len(methods)
    assert {method.kind for method in methods} == {"strategy"}
    assert any(method.stored and method.cotangent for method in methods)


def test_conversion_reaches_every_linear_layer():
    model = DigitsMLP(16)
    handle = ROWS.convert(model)
    assert [row.status for row in handle.rows] == ["converted"] * 3
    assert EXACT.convert(model) is None


def test_strategy_that_does_not_fit_is_named_with_the_network():
    too_high = Method("rank 99", "rank", cotangent=LowRank(rank=99))
    with pytest.raises(BudgetError, match=r"rank 99 does not fit tiny: .*rank=99"):
        check_methods((ROWS, too_high), TINY.build_seeded(0), TINY.name)


def test_training_is_reproducible_and_sketches_change_it(data):
    def weights(method, seed=0):
        return train(TINY, method, data, seed).layers[0].weight.detach()

    assert torch.equal(weights(EXACT), weights(EXACT))
    assert torch.equal(weights(ROWS), weights(ROWS))
    assert not torch.equal(weights(EXACT), weights(ROWS))
    assert not torch.equal(weights(EXACT), weights(EXACT, seed=1))


def test_training_can_stop_half_way(data):
    torch.manual_seed(0)
    started = TINY.build_seeded(0).layers[0].weight
    weights = [train(TINY, EXACT, data, 0, steps=steps).layers[0].weight for steps in (0, 3, 4)]
    assert torch.equal(weights[0], started)
    assert not torch.equal(weights[1], weights[2])
    assert torch.equal(weights[2], train(TINY, EXACT, data, 0).layers[0].weight)


def test_exact_training_learns(data):
    setup = Setup("small", "", partial(DigitsMLP, 64), 128, 60, 5e-3, 24)
    assert measure_accuracy(train(setup, EXACT, data, 0), data) > 0.9


def test_every_method_is_timed_in_every_round(data):
    rounds = []
    seconds = time_steps(TINY, (EXACT, ROWS), data, rounds=3, on_round=lambda: rounds.append(1))
    assert len(rounds) == 3 + 2
    assert len(seconds) == 2
    assert all(0 < took < 5 for took in seconds)


def test_ladder_of_batches_spans_the_usual_size():
    assert [method.batch_size for method in make_batch_ladder(TINY)] == [16, 24, 48]


@pytest.mark.parametrize(
    ("seconds", "size"),
    [(1.5, 96), (1.0, 64), (0.1, 64), (3.0, 192), (2.5, 160), (99.0, 192)],
)
def test_equal_step_time_is_interpolated(seconds, size):
    assert find_batch_size(seconds, [(192, 3.0), (64, 1.0), (128, 2.0)]) == size


def test_equal_step_time_where_a_larger_batch_was_measured_faster():
    assert find_batch_size(1.9, [(64, 1.0), (96, 2.0), (128, 1.8)]) in range(64, 129)


@pytest.fixture(scope="module")
def meter(data):
    model = train(TINY, EXACT, data, 0)
    return NoiseMeter(TINY, model, data.train_pictures[:24], data.train_classes[:24])


def test_exact_method_has_no_noise(meter):
    noise = meter.measure(EXACT, 8)
    assert (noise.predicted, noise.fraction, noise.moments.max_abs_z) == (0, 0, 0)


def test_half_a_batch_doubles_the_variance_of_the_batch(meter):
    noise = meter.measure(Method("half", "batch", batch_size=16), 2000)
    assert noise.fraction == pytest.approx(1, abs=0.08)
    assert noise.moments.relative_variance == pytest.approx(noise.predicted, rel=0.08)
    assert noise.moments.unbiased


def test_larger_batch_has_less_noise_than_the_usual_one(meter):
    noise = meter.measure(Method("more", "batch", batch_size=40), 8)
    assert noise.fraction == pytest.approx(32 / 40 - 1)
    assert noise.moments is None


def test_strategy_is_unbiased_and_its_last_layer_obeys_its_law(meter):
    noise = meter.measure(ROWS, 400)
    assert noise.moments.draws == 400
    assert noise.moments.unbiased
    # Noise that travels down through dX comes on top of the layers' own.
    assert noise.predicted * 0.9 < noise.moments.relative_variance < noise.predicted * 3


def test_directory_is_made(tmp_path):
    prepare_directory(tmp_path / "new" / "deep", "--out")
    assert list((tmp_path / "new" / "deep").iterdir()) == []


def test_directory_that_is_a_file_is_refused(tmp_path):
    blocker = tmp_path / "blocker"
    blocker.write_text("mine")
    with pytest.raises(OutputError, match=f"output directory '{blocker}'.*another one with --place"):
        prepare_directory(blocker, "--place")
    assert blocker.read_text() == "mine"


def test_file_is_replaced_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_replaced_file_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(mode)
    write_whole(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("is_there", [True, False])
def test_links_stay_and_their_target_is_replaced(tmp_path, monkeypatch, is_there):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    target, chain, link = there / "file", here / "chain", here / "link"
    if is_there:
        target.write_bytes(b"old")
    chain.symlink_to(os.path.join("..", "there", "file"))
    link.symlink_to(chain)
    renamed = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda source, place: (renamed.append(source), replace(source, place)))
    prepare_file(link, "--out")
    write_whole(link, b"new")
    assert link.is_symlink()
    assert chain.is_symlink()
    assert not target.is_symlink()
    assert target.read_bytes() == b"new"
    # On the file system of the target: names can be exchanged there.
    assert [os.path.dirname(source) for source in renamed] == [str(there)]
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["chain", "file", "here", "link", "there"]


def test_links_in_a_circle_are_refused(tmp_path):
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    with pytest.raises(OutputError, match=r"one.*name another file with --json"):
        prepare_file(tmp_path / "one", "--json")
    with pytest.raises(OutputError, match=r"cannot write .*one"):
        write_whole(tmp_path / "one", b"new")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["one", "two"]
    assert all(entry.is_symlink() for entry in tmp_path.iterdir())


@pytest.mark.parametrize("behind_link", [False, True])
def test_pipes_are_written_to_and_stay(tmp_path, behind_link):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    path = tmp_path / "link" if behind_link else pipe
    if behind_link:
        path.symlink_to(pipe)
    read = []
    # A thread that waits for nobody must not keep the suite from ending.
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    prepare_file(path, "--out")
    write_whole(path, b"new")
    reader.join(timeout=20)
    assert read == [b"new"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert path.is_symlink() == behind_link


def test_directories_are_no_files(tmp_path):
    with pytest.raises(OutputError, match="it is a directory; name a file with --json"):
        prepare_file(tmp_path, "--json")
    with pytest.raises(OutputError, match="Is a directory"):
        write_whole(tmp_path, b"new")


def test_environment_has_versions_but_no_names():
    environment = describe_environment()
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()
    assert not set(environment) & {"host", "hostname", "user"}
