"""What the pages conclude follows from the records: planted results, whose conclusions are known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.experiments.choices import write_situations, write_time_choice
from benchmarks.experiments.remedies import write_remedies
from benchmarks.experiments.results import KINDS, Row, TaskResults
from benchmarks.experiments.targets import write_targets

SPEED, MEMORY, UNIFORM = "recipes.speed(0.3)", "recipes.memory(4)", "uniform masks, rows 0.3"
BATCH = f"smaller batch, time of {SPEED}"
LADDER = ((50, 0.5), (100, 1.0))
# By seed, so that differences vary a little.
WIGGLE = (0.0, 0.0004, -0.0003, 0.0002, -0.0002)


def make_record(seed, *, accuracy, loss, held, omega, batch, steps):
    curve = [{"step": step, "validation_loss": 2.0 - step / 100} for step in range(10, 110, 10)]
    noise = {"step": 50, "omega": omega, "squared_gradient": 1.0, "mini_batch_variance": 1.0}
    result = {
        "test_accuracy": accuracy + WIGGLE[seed] * (1 if omega is not None else 0),
        "test_loss": loss + WIGGLE[seed] * (1 if omega is not None else 0),
        "held_bytes": held,
        "training_cpu_seconds": 10.0,
        "curve": curve,
        "noise": [noise],
    }
    return {"result": result, "declaration": {"batch_size": batch, "steps": steps, "learning_rate": 0.1}}


def make_row(label, family, *, accuracy=0.985, loss=1.0, time=1.0, held=100, omega=None, batch=100, seeds=5, **changes):
    match = SPEED if label == BATCH else ""
    costs = {"ratio": time, "backward_ratio": time - 0.2, "held_share": held / 100}
    fields = {
        "label": label,
        "family": family,
        "budget": 0.3 if "0.3" in label and not match else None,
        "published": "",
        "is_biased": False,
        "is_tuned": False,
        "match_label": match,
        "match_by": "time, batch" if match else "",
        "is_adaptive": False,
        "exact_share": 0.0,
        "unavailable": "",
        "costs": None if match else costs,
        "ladder": LADDER if match else (),
        "runs": {
            seed: make_record(seed, accuracy=accuracy, loss=loss, held=held, omega=omega, batch=batch, steps=100)
            for seed in range(seeds)
        },
    }
    return Row(**{**fields, **changes})


def make_task(kind, *, sketch=0.985, smaller=0.975, time=0.6, bytes_held=20, omega=0.05, seeds=5, **changes):
    is_text = kind == "language model"
    rows = (
        make_row("exact", "exact", seeds=seeds),
        make_row(SPEED, "speed", accuracy=sketch, loss=2 - sketch, time=time, omega=omega, seeds=seeds),
        make_row(MEMORY, "memory", time=1.2, held=bytes_held, omega=0.001, seeds=seeds, loss=1.0, accuracy=0.985),
        make_row(UNIFORM, "uniform rows", accuracy=0.9, loss=1.3, time=time, omega=0.5, seeds=seeds),
        make_row(BATCH, "batch", accuracy=smaller, loss=2 - smaller, batch=round(100 * time), seeds=seeds),
    )
    name = ("wide " if kind == "MLP" else "") + f"{kind} on data"
    environment = {"processor": "a processor", "torch": "2", "commit": "abc"}
    fields = {"network": "network", "data": "data", "is_text": is_text, "command": "command", "left_out": ()}
    return TaskResults(name, **{**fields, **changes}, rows=rows, environments=(environment,))


def read_states(tasks):
    lines = write_targets(tasks).splitlines()[2:]
    return {line.split(" | ")[0].strip("| "): line.split(" | ")[-1].strip("| ") for line in lines}


def test_everything_is_reached_where_it_is():
    states = read_states([make_task(kind) for kind in KINDS])
    assert len(states) == 8
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
        ({"smaller": 0.985}, "equal-cost frontier"),
        ({"smaller": 0.99}, "equal-cost frontier"),
        ({"omega": 0.6}, "data-dependent against uniform: ω"),
        ({"sketch": 0.6}, "data-dependent against uniform: loss"),
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


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({}, f"`{SPEED}`"),
        ({"smaller": 0.9851}, f"a smaller batch, or `{SPEED}`"),
        ({"smaller": 0.995}, "a smaller batch, or fewer steps"),
        ({"time": 0.97}, "a smaller batch, or fewer steps"),
    ],
)
@pytest.mark.parametrize("kind", ["ViT", "language model"])
def test_advice_on_time_follows_the_comparison(kind, changes, advice):
    lines = [line for line in write_situations([make_task(kind, **changes)]).splitlines() if "time is short" in line]
    assert [line.split(" | ")[1] for line in lines] == [advice]


def test_advice_on_memory_is_the_fastest_that_loses_nothing():
    lines = write_situations([make_task("ViT")]).splitlines()
    assert f"`{MEMORY}`" in next(line for line in lines if "memory is short" in line)
    lines = write_situations([make_task("ViT", bytes_held=60)]).splitlines()
    assert "not known" in next(line for line in lines if "memory is short" in line)


def test_no_setting_is_shown_without_its_smaller_batch():
    task = make_task("ViT")
    alone = replace(task, rows=task.rows[:4])
    assert SPEED in write_time_choice([task])
    assert write_time_choice([alone]) == ""


def test_remedies_stand_beside_what_they_mend():
    task = make_task("ViT")
    assert write_remedies([task]) == ""
    remedy = make_row(f"{SPEED}, last 20 % exact", "speed", time=0.5, omega=0.02, exact_share=0.2)
    page = write_remedies([replace(task, rows=(*task.rows, remedy))])
    plain, mended = page.splitlines()[2:]
    assert plain.split(" | ")[1:3] == [SPEED, "0.60"]
    # A fifth of the steps in full, the others in half the time.
    assert mended.split(" | ")[1:3] == [remedy.label, "0.60"]
