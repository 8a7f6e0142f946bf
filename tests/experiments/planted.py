"""Results of experiments whose conclusions are known, because they were made up."""

from __future__ import annotations

import re
import zlib
from dataclasses import replace

import numpy as np

from benchmarks.experiments.results import Row, TaskResults

SPEED, MEMORY, UNIFORM = "recipes.speed(0.3)", "recipes.memory(4)", "uniform masks, rows 0.3"
BATCH, STEPS = f"smaller batch, time of {SPEED}", f"fewer steps, time of {SPEED}"
LADDER = ((50, 0.5), (100, 1.0))
STEPS_OF_ALL = 100
# At omega 0.5, with as much noise as signal, the bound predicts 1.35 times as many steps.
UNIFORM_OMEGA, UNIFORM_SLOWER = 0.5, 1.35


def scatter(label, seeds):
    """Return small numbers of mean 0 that belong to a label, so that differences vary a little."""
    values = np.random.default_rng(zlib.crc32(label.encode())).normal(0, 3e-4, seeds)
    return values - values.mean() if seeds else values


def make_record(identity, *, accuracy, loss, held, omega, batch, steps=STEPS_OF_ALL, slower=1.0, validation=None):
    """Return what a training leaves behind.

    The loss on validation data falls on a line, reaches the target (1.4) after 60 slower steps, and ends with the run.
    """
    curve = [{"step": step, "validation_loss": 2.0 - step / 100 / slower} for step in range(10, steps + 10, 10)]
    noise = {"step": 50, "omega": omega, "squared_gradient": 1.0, "mini_batch_variance": 1.0}
    result = {
        "test_accuracy": accuracy,
        "validation_accuracy": accuracy if validation is None else validation,
        "test_loss": loss,
        "held_bytes": held,
        "training_cpu_seconds": 10.0,
        "planning_seconds": 0.0,
        "curve": curve,
        "noise": [noise],
    }
    declaration = {"batch_size": batch, "steps": steps, "learning_rate": 0.1}
    return {"id": identity, "result": result, "declaration": declaration}


def make_row(
    label,
    family,
    *,
    accuracy=0.985,
    loss=1.0,
    time=1.0,
    held=100,
    omega=None,
    seeds=5,
    match="",
    by="",
    batch=100,
    steps=STEPS_OF_ALL,
    slower=1.0,
    validation=None,
    **changes,
):
    """Return a row; figures that are given as a sequence are those of the seeds."""

    def of_seed(value, seed, noise):
        return float(value) + noise[seed] if np.ndim(value) == 0 else float(value[seed])

    noise = scatter(label, seeds)
    runs = {
        seed: make_record(
            f"{label} {seed}",
            accuracy=of_seed(accuracy, seed, noise),
            loss=of_seed(loss, seed, noise),
            held=held,
            omega=omega,
            batch=batch,
            steps=steps,
            slower=slower if np.ndim(slower) == 0 else slower[seed],
            validation=validation,
        )
        for seed in range(seeds)
    }
    fields = {
        "label": label,
        "family": family,
        "budget": float(found[0][2]) if (found := re.findall(r"(\(|(rows|columns) )(0\.\d)", label)) else None,
        "published": "",
        "is_biased": False,
        "is_tuned": False,
        "match_label": match,
        "match_by": by,
        "is_adaptive": False,
        "exact_share": 0.0,
        "words": match or label,
        "unavailable": "",
        "costs": None if match else {"ratio": time, "backward_ratio": time - 0.2, "held_share": held / 100},
        "ladder": LADDER if match else (),
        "runs": runs,
    }
    return Row(**{**fields, **changes})


def make_setting(label, *, smaller=0.975, fewer=None, time=0.6, seeds=5, **changes):
    """Return a setting and the exact methods of equal time beside it."""
    beside = {"seeds": seeds, "match": label}
    rows = [
        make_row(label, "speed", time=time, seeds=seeds, **changes),
        make_row(
            f"smaller batch, time of {label}",
            "batch",
            accuracy=smaller,
            loss=2 - np.asarray(smaller),
            batch=round(100 * time),
            by="time, batch",
            **beside,
        ),
    ]
    if fewer is not None:
        steps = round(STEPS_OF_ALL * time / 10) * 10
        beside |= {"steps": steps, "by": "time, steps"}
        rows.append(
            make_row(f"fewer steps, time of {label}", "steps", accuracy=fewer, loss=2 - np.asarray(fewer), **beside)
        )
    return rows


def make_task(
    kind,
    *,
    sketch=0.985,
    smaller=0.975,
    fewer=None,
    time=0.6,
    bytes_held=20,
    omega=0.05,
    slower=1.0,
    seeds=5,
    **changes,
):
    """Return a task on which everything is as good as was asked for, but for what is changed."""
    rows = (
        make_row("exact", "exact", seeds=seeds),
        *make_setting(
            SPEED,
            accuracy=sketch,
            loss=2 - sketch,
            time=time,
            omega=omega,
            seeds=seeds,
            smaller=smaller,
            fewer=fewer,
            slower=slower,
        ),
        make_row(MEMORY, "memory", time=1.2, held=bytes_held, omega=0.001, seeds=seeds),
        make_row(
            UNIFORM,
            "uniform rows",
            accuracy=0.9,
            loss=1.3,
            time=time,
            omega=UNIFORM_OMEGA,
            slower=UNIFORM_SLOWER,
            seeds=seeds,
        ),
    )
    return make_results(kind, rows, **changes)


def weigh(omega, of_others, omega_adamw, noise_to_signal, noise_to_signal_adamw):
    """Return noise of a method at a point of exact training, as it is recorded."""
    return {
        "omega": omega,
        "omega_adamw": omega_adamw,
        "noise_to_signal": noise_to_signal,
        "noise_to_signal_adamw": noise_to_signal_adamw,
        "largest": "head.weight",
        "its_share": 0.6,
        "omega_of_others": of_others,
    }


def make_results(kind, rows, **changes):
    """Return results of these rows."""
    name = ("wide " if kind == "MLP" else "") + f"{kind} on data"
    environment = {"processor": "a processor", "torch": "2", "commit": "abc"}
    is_text = kind == "language model"
    fields = {"network": "network", "data": "data", "is_text": is_text, "command": "command", "left_out": ()}
    return TaskResults(name, **{**fields, **changes}, rows=tuple(rows), environments=(environment,))


def exchange(results, label, **changes):
    """Return results with some fields of a row changed."""
    rows = tuple(replace(row, **changes) if row.label == label else row for row in results.rows)
    return replace(results, rows=rows)


def add(results, *rows):
    """Return results with more rows."""
    return replace(results, rows=(*results.rows, *rows))
