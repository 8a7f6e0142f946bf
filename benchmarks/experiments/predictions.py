"""Steps predicted from noise, as it stands and in units of the optimizer's steps, beside what trainings took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.experiments.analysis import has_smaller_batch, list_distinct
from benchmarks.experiments.equivalent import Equivalent, measure_equivalent
from benchmarks.experiments.methods import EXACT
from benchmarks.experiments.results import Row, TaskResults
from benchmarks.experiments.smaller_batches import BatchCurve, list_smaller, read_batch_curve
from benchmarks.experiments.statistics import summarise
from benchmarks.experiments.tables import name_all, write_equivalent, write_number, write_table
from cheapgrad.planning import tradeoff

_UNITS = ("", "_adamw")


@dataclass(frozen=True)
class Prediction:
    """A method, its noise at the weights of exact training, and the steps that follow from it.

    Attributes:
        row: the method.
        omega: added variance ÷ that of the mini-batch, every entry alike, at each point of the training.
        omega_adamw: the same in units of AdamW's steps.
        predicted: ratio of steps by `omega`.
        predicted_adamw: ratio of steps by `omega_adamw`.
        predicted_batches: ratio of steps of smaller batches of the task that have as much noise, by `omega_adamw`; None
            where none were trained, and for those that it is read off.
        is_beyond: whether it lies beyond the smallest batch whose steps are measured, at one point at least.
        measured: steps of the method ÷ those of the exact training that ends as well.
    """

    row: Row
    omega: tuple[float, ...]
    omega_adamw: tuple[float, ...]
    predicted: float
    predicted_adamw: float
    predicted_batches: float | None
    is_beyond: bool
    measured: Equivalent


def list_predictions(results: TaskResults) -> list[Prediction]:
    """Return every method whose noise was weighed and whose steps are measured, smaller batches among them.

    A batch of a share q of the examples has ``1 + ω = 1/q``, whatever the unit.
    """
    found = []
    curve, own = read_batch_curve(results), {row.run_ids for row in list_smaller(results)}
    for row in list_distinct(results.rows) if results.weighed else []:
        measured = measure_equivalent(results, row)
        if measured is None or row is results.exact or row.is_tuned:
            continue
        points = [_weigh(results, row, point["methods"]) for point in results.weighed]
        known = [each for each in points if each is not None]
        if not known:
            continue
        omega, omega_adamw = zip(*(noise for noise, _ in known), strict=True)
        ratios = (summarise(values)[0] for values in zip(*(each for _, each in known), strict=True))
        by_batches = None if row.run_ids in own else _read_mean(curve, omega_adamw)
        is_beyond = curve is not None and max(omega_adamw) > curve.most
        found.append(Prediction(row, omega, omega_adamw, *ratios, by_batches, is_beyond, measured))
    return found


def _read_mean(curve: BatchCurve | None, omegas: Sequence[float]) -> float | None:
    return None if curve is None else summarise([curve.read(omega) for omega in omegas])[0]


def _weigh(
    results: TaskResults, row: Row, methods: dict[str, dict[str, Any]]
) -> tuple[tuple[float, float], list[float]] | None:
    """Return the omegas and both ratios of steps at one point of the training.

    How much noise exact training has beside its signal is a property of the training, not of the method.
    """
    exact = methods[EXACT.step_words]
    if has_smaller_batch(row):
        more = results.exact.declaration["batch_size"] / row.declaration["batch_size"] - 1
        omegas = (more, more)
    elif not row.match_label and row.words in methods:
        own, share = methods[row.words], 1 - row.exact_share
        omegas = (own["omega"] * share, own["omega_adamw"] * share)
    else:
        return None
    ratios = []
    for omega, unit in zip(omegas, _UNITS, strict=True):
        ratio = exact[f"noise_to_signal{unit}"]
        ratios.append(tradeoff(1.0, omega, noise_to_target=math.inf if ratio is None else ratio).steps_ratio)
    return omegas, ratios


def write_predictions(all_results: Sequence[TaskResults]) -> str:
    """Return a table of noise and steps in both units, and where the noise of the mini-batches is."""
    rows, places = [], []
    for results in all_results:
        found = list_predictions(results)
        for each in found:
            cells = [results.task, name_all(results, each.row)]
            cells += [_write_points(values) for values in (each.omega, each.omega_adamw)]
            cells += [write_number(value) for value in (each.predicted, each.predicted_adamw)]
            by_batches = write_number(each.predicted_batches)
            cells.append(f"({by_batches})" if each.is_beyond and each.predicted_batches is not None else by_batches)
            rows.append([*cells, write_equivalent(each.measured), str(each.measured.seeds)])
        if found:
            places.append(_say_place(results))
    heads = "task|method|ω|ω, AdamW|predicted by ω|by ω, AdamW|by smaller batches|measured [95 %]|seeds"
    words = f"Largest tensor, by its share of the mini-batch's variance: {'; '.join(places)}." if places else ""
    return "\n\n".join(part for part in (write_table(heads.split("|"), rows), words) if part)


def _write_points(values: Sequence[float]) -> str:
    """Return the least and the largest of the points of the training."""
    return " to ".join(dict.fromkeys(f"{value:.2g}" for value in (min(values), max(values))))


def _say_place(results: TaskResults) -> str:
    places: dict[str, list[float]] = {}
    for point in results.weighed:
        exact = point["methods"][EXACT.step_words]
        places.setdefault(exact["largest"], []).append(100 * exact["its_share"])
    words = [f"`{name}` ({min(shares):.0f} to {max(shares):.0f} %)" for name, shares in places.items()]
    return f"{results.task}: {', later in training '.join(words)}"
