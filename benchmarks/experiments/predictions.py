"""Steps predicted from noise, as it stands and in units of the optimizer's steps, beside what trainings took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.experiments.analysis import Equivalent, list_distinct, measure_equivalent
from benchmarks.experiments.methods import EXACT
from benchmarks.experiments.results import Row, TaskResults
from benchmarks.experiments.statistics import summarise
from benchmarks.experiments.tables import name_all, write_equivalent, write_number, write_table
from cheapgrad.planning import tradeoff


@dataclass(frozen=True)
class Prediction:
    """A method, its noise at the weights of exact training, and the steps that follow from it.

    Attributes:
        row: the method.
        omega: added variance ÷ that of the mini-batch, every entry alike.
        omega_adamw: the same in units of AdamW's steps.
        predicted: ratio of steps by the first.
        predicted_adamw: ratio of steps by the second.
        measured: steps of the method ÷ those of the exact training that ends as well.
    """

    row: Row
    omega: float
    omega_adamw: float
    predicted: float
    predicted_adamw: float
    measured: Equivalent


def list_predictions(results: TaskResults) -> list[Prediction]:
    """Return every method whose noise was weighed and whose steps are measured, smaller batches among them.

    A batch of a share q of the examples has ``1 + ω = 1/q``, whatever the unit.
    """
    found = []
    for row in list_distinct(results.rows) if results.weighed else []:
        measured = measure_equivalent(results, row)
        if measured is None or row is results.exact or row.is_tuned:
            continue
        points = [_weigh(results, row, point["methods"]) for point in results.weighed]
        known = [each for each in points if each is not None]
        if known:
            found.append(Prediction(row, *(summarise(values)[0] for values in zip(*known, strict=True)), measured))
    return found


def _weigh(results: TaskResults, row: Row, methods: dict[str, dict[str, Any]]) -> tuple[float, ...] | None:
    """Return both omegas and both ratios of steps at one point of the training."""
    if row.match_by == "time, batch":
        found = methods[EXACT.step_words]
        plain = weighed = results.exact.declaration["batch_size"] / row.declaration["batch_size"] - 1
    elif not row.match_label and row.words in methods:
        found = methods[row.words]
        plain, weighed = (found[name] * (1 - row.exact_share) for name in ("omega", "omega_adamw"))
    else:
        return None
    ratios = [
        tradeoff(1.0, omega, noise_to_target=math.inf if found[name] is None else found[name]).steps_ratio
        for omega, name in ((plain, "noise_to_signal"), (weighed, "noise_to_signal_adamw"))
    ]
    return plain, weighed, *ratios


def write_predictions(all_results: Sequence[TaskResults]) -> str:
    """Return a table of noise and steps in both units, and where the noise of the mini-batches is."""
    rows, places = [], []
    for results in all_results:
        found = list_predictions(results)
        for each in found:
            cells = [results.task, name_all(results, each.row)]
            cells += [f"{value:.3g}" for value in (each.omega, each.omega_adamw)]
            cells += [write_number(value) for value in (each.predicted, each.predicted_adamw)]
            rows.append([*cells, write_equivalent(each.measured)])
        if results.weighed:
            places.append(_say_place(results))
    heads = "task|method|ω|ω, AdamW|predicted by ω|predicted by ω, AdamW|measured [95 %]"
    words = f"Most of the mini-batch's variance is in {'; in '.join(places)}." if places else ""
    return "\n\n".join(part for part in (write_table(heads.split("|"), rows), words) if part)


def _say_place(results: TaskResults) -> str:
    places: dict[str, list[float]] = {}
    for point in results.weighed:
        exact = point["methods"][EXACT.step_words]
        places.setdefault(exact["largest"], []).append(exact["its_share"])
    words = [
        f"`{name}` ({' and '.join(f'{100 * share:.0f} %' for share in shares)})" for name, shares in places.items()
    ]
    return f"{', then '.join(words)} on {results.task}"
