"""Whether targets are reached follows from the records: planted results, whose conclusions are known."""

from __future__ import annotations

import pytest

from benchmarks.experiments.results import KINDS
from benchmarks.experiments.targets import write_targets
from tests.experiments.planted import make_task


def read_states(tasks):
    lines = write_targets(tasks).splitlines()[2:]
    return {line.split(" | ")[0].strip("| "): line.split(" | ")[-1].strip("| ") for line in lines}


def test_everything_is_reached_where_it_is():
    states = read_states([make_task(kind) for kind in KINDS])
    assert len(states) == 10
    # Their judges have tests of their own, beside those of what they judge.
    assert [states.pop(what) for what in list(states) if what.startswith("theory, by")] == ["not run"] * 2
    assert set(states.values()) == {"reached"}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"sketch": 0.979}, "MLP, width ≥ 1024"),
        ({"time": 0.8}, "MLP, width ≥ 1024"),
        ({"time": 0.8}, "ViT and BagNet"),
        ({"omega": 0.3}, "ViT and BagNet"),
        ({"sketch": 0.981}, "ViT and BagNet"),
        ({"bytes_held": 26}, "memory recipe, 4 bits"),
        ({"time": 0.85}, "time to the target"),
        ({"slower": 1.5}, "time to the target"),
        ({"slower": 1.7}, "time to the target"),
        ({"smaller": 0.985}, "equal-cost frontier"),
        ({"smaller": 0.99}, "equal-cost frontier"),
        ({"time": 0.97}, "equal-cost frontier"),
        ({"omega": 0.6}, "data-dependent against uniform: ω"),
        ({"sketch": 0.6}, "data-dependent against uniform: loss"),
        ({"slower": 1.3}, "theory"),
        ({"slower": 1.7}, "theory"),
    ],
)
def test_a_target_that_is_missed_is_said_to_be(changes, what):
    state = read_states([make_task(kind, **changes) for kind in KINDS])[what]
    assert state.startswith("not reached: 0 of")


def test_what_was_not_run_and_few_seeds_are_said():
    assert set(read_states([]).values()) == {"not run"}
    states = read_states([make_task("ViT", seeds=3)])
    assert states["MLP, width ≥ 1024"] == "not run"
    assert states["memory recipe, 4 bits"] == "not run on all: 1 of 4, with 3 seeds"
    assert read_states([make_task(kind, seeds=3) for kind in KINDS])["theory"] == "reached, with 3 seeds"
    # Digits are for trying out; no target is met on them.
    assert set(read_states([make_task(kind, data="digits") for kind in KINDS]).values()) == {"not run"}


def test_one_seed_reaches_nothing_that_needs_a_comparison():
    states = read_states([make_task(kind, seeds=1) for kind in KINDS])
    compared = ("memory recipe, 4 bits", "time to the target", "equal-cost frontier")
    assert {states[what] for what in (*compared, "data-dependent against uniform: loss")} == {
        "not reached: 0 of 4, with 1 seed",
        "not reached: 0 of 2, with 1 seed",
    }
