"""The runner loses no run and repeats none, whatever happens to it."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.experiments.declaration import TrainingRun, describe, identify
from benchmarks.experiments.runner import find_missing, run_all, work
from benchmarks.experiments.store import Lines, Store
from cheapgrad.errors import RecordError


def make_run(seed: int, rate: float = 0.1) -> TrainingRun:
    return TrainingRun("task", "network", "data", "exact", 8, 1, 10, rate, seed, 2, 0)


@dataclass
class Counting:
    """Runs that write down, one byte each, that they were made; the second half is known once the first is there."""

    directory: Path
    count: int = 6
    seconds: float = 0.0
    failing: tuple[int, ...] = ()

    def declare(self, records):
        first = [make_run(seed) for seed in range(self.count // 2)]
        if any(records.find(identify(run)) is None for run in first):
            return first
        # One of the first half is declared again: the same run, however often it is asked for.
        return [*first, first[0], *[make_run(seed) for seed in range(self.count // 2, self.count)]]

    def name_lock(self, declaration):
        return identify(declaration)

    def execute(self, declaration):
        if declaration.seed in self.failing:
            raise ArithmeticError(f"seed {declaration.seed} does not work")
        time.sleep(self.seconds)
        with (self.directory / f"made_{declaration.seed}").open("ab") as stream:
            stream.write(b".")
        return {"value": declaration.seed / 10}

    def count_made(self) -> dict[int, int]:
        sizes = {seed: self.directory / f"made_{seed}" for seed in range(self.count)}
        return {seed: path.stat().st_size if path.exists() else 0 for seed, path in sizes.items()}


def work_in(directory: Path, seconds: float) -> None:
    work(Counting(directory, seconds=seconds), Store(directory / "store"))


def test_identity_is_that_of_the_declaration_and_of_nothing_else():
    assert identify(make_run(0)) == identify(make_run(0)) == identify(describe(make_run(0)))
    fields = {"seed": 1, "rate": 0.2}
    assert (
        len({identify(make_run(0)), *(identify(make_run(0, **{"rate": 0.2})), identify(make_run(fields["seed"])))}) == 3
    )
    # What is kept in files for years: a change of the hash would orphan every record.
    assert identify(json.loads(json.dumps(describe(make_run(0))))) == identify(make_run(0))


def test_every_run_is_made_once_and_none_again(tmp_path):
    experiment, store = Counting(tmp_path), Store(tmp_path / "store")
    assert work(experiment, store) == []
    assert work(experiment, Store(tmp_path / "store")) == []
    assert experiment.count_made() == dict.fromkeys(range(6), 1)
    assert find_missing(experiment, store) == ([], 6)
    record = store.find(identify(make_run(3)))
    assert record is not None
    assert record["result"] == {"value": 0.3}
    assert record["environment"]["seed"] == 3
    assert {"commit", "torch", "processor", "threads"} <= set(record["environment"])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: text.replace('"seed": 1', '"seed": 2'),
        lambda text: text.replace('"result"', '"other"'),
        lambda text: "[1, 2]",
    ],
    ids=["half", "empty", "another run's", "no result", "no record"],
)
def test_damaged_record_is_ignored_named_and_made_again(tmp_path, spoil):
    experiment, store = Counting(tmp_path), Store(tmp_path / "store")
    work(experiment, store)
    path = tmp_path / "store" / "runs" / f"{identify(make_run(1))}.json"
    whole = path.read_text()
    path.write_text(spoil(whole))
    again = Store(tmp_path / "store")
    assert again.list_damaged() == [path.name]
    assert work(experiment, again) == []
    assert experiment.count_made() == {**dict.fromkeys(range(6), 1), 1: 2}
    assert json.loads(path.read_text())["result"] == json.loads(whole)["result"]


def test_a_killed_process_leaves_no_half_record_and_no_lock(tmp_path):
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=work_in, args=(tmp_path, 0.2))
    process.start()
    wait_until(lambda: sum(Counting(tmp_path).count_made().values()) >= 2)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    store = Store(tmp_path / "store")
    done = {seed for seed in range(6) if store.find(identify(make_run(seed))) is not None}
    assert 1 <= len(done) < 6
    assert store.list_damaged() == []
    made = Counting(tmp_path).count_made()
    # Locks of the dead are nobody's: this does not wait.
    assert work(Counting(tmp_path), store) == []
    after = Counting(tmp_path).count_made()
    assert all(after[seed] == made[seed] for seed in done)
    assert all(store.find(identify(make_run(seed))) is not None for seed in range(6))


def test_processes_share_the_runs_out(tmp_path):
    console, committed = Console(file=io.StringIO()), tmp_path / "committed.jsonl"
    before = Store(tmp_path / "before")
    before.save(describe(make_run(1)), {"value": 0.1}, {})
    before.export(committed)
    errors = run_all(partial(Counting, tmp_path, seconds=0.05), tmp_path / "store", 2, console, (committed,))
    assert errors == []
    # What came with the repository is not made again.
    assert Counting(tmp_path).count_made() == {**dict.fromkeys(range(6), 1), 1: 0}


def test_committed_records_count_as_made_and_own_ones_come_first(tmp_path):
    first = Store(tmp_path / "first")
    work(Counting(tmp_path), first)
    first.export(tmp_path / "committed.jsonl")
    (tmp_path / "second").mkdir()
    experiment = Counting(tmp_path / "second")
    second = Store(tmp_path / "second" / "store", [tmp_path / "committed.jsonl", tmp_path / "missing.jsonl"])
    assert work(experiment, second) == []
    assert experiment.count_made() == dict.fromkeys(range(6), 0)
    second.save(describe(make_run(1)), {"value": 7}, {"seed": 1})
    again = Store(tmp_path / "second" / "store", [tmp_path / "committed.jsonl"])
    values = [record["result"]["value"] for seed in range(3) if (record := again.find(identify(make_run(seed))))]
    assert values == [0.0, 7, 0.2]


def test_a_claimed_run_is_left_to_who_claimed_it(tmp_path):
    store = Store(tmp_path)
    with store.claim("run") as is_ours:
        assert is_ours
        with Store(tmp_path).claim("run") as is_theirs:
            assert not is_theirs
        with store.claim("another run") as is_ours_too:
            assert is_ours_too
    with Store(tmp_path).claim("run") as is_theirs:
        assert is_theirs


def test_a_failing_run_is_told_and_stops_no_other(tmp_path):
    experiment, store = Counting(tmp_path, failing=(4,)), Store(tmp_path / "store")
    (error,) = work(experiment, store)
    assert "seed 4 does not work" in error
    assert experiment.count_made() == {**dict.fromkeys(range(6), 1), 4: 0}
    assert store.find(identify(make_run(4))) is None


def test_lines_have_what_the_store_has(tmp_path):
    store = Store(tmp_path / "store")
    work(Counting(tmp_path), store)
    path = tmp_path / "records.jsonl"
    assert store.export(path) == 6
    with path.open("a") as stream:
        stream.write('{"kind": "cheapgrad.experi')
    assert {record["id"]: record for record in Lines(path)} == {
        identify(make_run(seed)): store.find(identify(make_run(seed))) for seed in range(6)
    }
    assert list(Lines(tmp_path / "nothing.jsonl")) == []


def test_what_json_cannot_hold_is_refused_by_name(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(RecordError, match=f"run {identify(make_run(0))} cannot be written"):
        store.save(describe(make_run(0)), {"loss": float("nan")}, {})
    assert store.find(identify(make_run(0))) is None


def wait_until(is_done, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not is_done():
        assert time.monotonic() < end
        time.sleep(0.01)
