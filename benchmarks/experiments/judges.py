"""What the records of one task say about each target that was set for the experiments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.experiments.analysis import (
    TARGET_SHARE,
    bytes_share,
    compare_rows,
    find_rival,
    list_distinct,
    measure_reach,
    time_share,
    time_to_target,
)
from benchmarks.experiments.choices import list_faster
from benchmarks.experiments.results import Row, TaskResults
from benchmarks.experiments.statistics import Comparison, correct_for_many, summarise
from benchmarks.experiments.tables import name_row, say_difference, say_winner, write_number

_SIGNIFICANT = 0.05
_BEST_ACCURACY, _WORST_LOSS, _FASTER_BACKWARD = 98.0, 0.2, 2.0
_FASTER_STEP, _POINTS_BELOW, _WORST_COST = 1.4, 0.3, 0.75
_FEWER_BYTES = 4.0
_FASTER_TO_TARGET = 1.25
_PREDICTED_WITHIN = 0.15

# A setting is chosen on these data, and judged on the others.
_CHOSEN_ON, _JUDGED_ON = "validation_accuracy", "test_accuracy"


@dataclass(frozen=True)
class Finding:
    """What the records of one task say about a target.

    Attributes:
        is_reached: whether the target is reached.
        text: the figures.
        seeds: pairs that they rest on.
    """

    is_reached: bool
    text: str
    seeds: int


Judge = Callable[[TaskResults], Finding | None]


def _list_settings(results: TaskResults) -> list[tuple[Row, float, Comparison]]:
    """Return unbiased methods of our own whose step time is known, with their difference to exact training."""
    found = []
    for row in list_distinct(results.rows):
        time, comparison = time_share(results, row), compare_rows(results, row, results.exact)
        if row is results.exact or row.is_biased or row.match_label or time is None or comparison is None:
            continue
        if row.omegas:
            found.append((row, time, comparison))
    return found


def judge_backward(results: TaskResults) -> Finding | None:
    """Judge accuracy and the time of the backward pass."""

    def meet(row: Row, figure: str) -> list[bool]:
        comparison = compare_rows(results, row, results.exact, figure)
        is_as_good = comparison is not None and comparison.mean >= -_WORST_LOSS
        return [_accuracy(row, figure) >= _BEST_ACCURACY, is_as_good, backward[name_row(row)] >= _FASTER_BACKWARD]

    settings = [(row, found) for row, _, found in _list_settings(results) if "backward_ratio" in (row.costs or {})]
    backward = {name_row(row): 1 / row.costs["backward_ratio"] for row, _ in settings if row.costs}
    if not settings:
        return None
    row, found = max(settings, key=lambda each: (sum(meet(each[0], _CHOSEN_ON)), backward[name_row(each[0])]))
    text = f"{_accuracy(row, _JUDGED_ON):.2f} %, {say_difference(results, found)}"
    text += f", backward {backward[name_row(row)]:.1f}× ({name_row(row)})"
    return Finding(all(meet(row, _JUDGED_ON)), text, found.pairs)


def _accuracy(row: Row, figure: str) -> float:
    return 100 * summarise(list(row.collect(figure).values()))[0]


def judge_speed(results: TaskResults) -> Finding | None:
    """Judge the time of a step, what it costs in accuracy, and the bound c (1 + ω)."""

    def cost(row: Row, time: float) -> float:
        return time * (1 + (row.worst_omega or 0.0))

    def meet(row: Row, time: float, figure: str) -> list[bool]:
        comparison = compare_rows(results, row, results.exact, figure)
        is_as_good = comparison is not None and comparison.mean >= -_POINTS_BELOW
        return [time <= 1 / _FASTER_STEP, is_as_good, cost(row, time) <= _WORST_COST]

    settings = _list_settings(results)
    if not settings:
        return None
    faster = [each for each in settings if each[1] < 1]
    if not faster:
        row, time, found = min(settings, key=lambda each: each[1])
        return Finding(False, f"no setting is faster than exact ({name_row(row)}: {1 / time:.2f}×)", found.pairs)
    row, time, found = max(faster, key=lambda each: (sum(meet(each[0], each[1], _CHOSEN_ON)), -each[1]))
    text = f"{1 / time:.2f}×, {say_difference(results, found)}, c (1 + ω) ≤ {cost(row, time):.2f} ({name_row(row)})"
    return Finding(all(meet(row, time, _JUDGED_ON)), text, found.pairs)


def judge_memory(results: TaskResults) -> Finding | None:
    """Judge bytes held by the memory recipe, and what it costs."""
    row = results.find_row("recipes.memory(4)")
    share = bytes_share(results, row) if row is not None else None
    comparison = compare_rows(results, row, results.exact) if row is not None else None
    if share is None or comparison is None:
        return None
    is_as_good = say_winner(results, comparison) != "the one beside it"
    text = f"{1 / share:.1f}× fewer bytes, {say_difference(results, comparison)}"
    return Finding(is_as_good and share <= 1 / _FEWER_BYTES, text, comparison.pairs)


def judge_time(results: TaskResults) -> Finding | None:
    """Judge the time to the target of exact training."""
    times = [(time_to_target(results, row), row, found.pairs) for row, _, found in _list_settings(results)]
    known = [(time, row, pairs) for time, row, pairs in times if time is not None and find_rival(results, row)]
    if not known:
        return None
    time, row, pairs = min(known, key=lambda each: each[0])
    rival = find_rival(results, row)
    beside = None if rival is None else time_to_target(results, rival)
    reach = "did not reach it on every seed" if beside is None else f"{1 / beside:.2f}×"
    text = f"{1 / time:.2f}× ({name_row(row)}; its smaller batch {reach})"
    return Finding(time <= 1 / _FASTER_TO_TARGET, text, pairs)


def judge_frontier(results: TaskResults) -> Finding | None:
    """Judge the settings beside their smaller batches of equal time."""
    found: dict[str, Comparison] = {}
    for row in list_faster(results):
        rival = find_rival(results, row)
        comparison = compare_rows(results, row, rival) if rival is not None else None
        if comparison is not None:
            found[name_row(row)] = comparison
    if not found:
        return None
    # The best of several settings is a choice: its p-value answers for all of them.
    adjusted = correct_for_many({name: comparison.p_value for name, comparison in found.items()})
    sign = -1.0 if results.is_text else 1.0
    best = max(found, key=lambda name: (_wins(sign, adjusted[name], found[name]), sign * found[name].mean))
    text = f"{say_difference(results, found[best])}, p {write_number(adjusted[best], '{:.2g}')} ({best})"
    return Finding(_wins(sign, adjusted[best], found[best]), text, found[best].pairs)


def _wins(sign: float, p_value: float, comparison: Comparison) -> bool:
    return sign * comparison.mean > 0 and p_value < _SIGNIFICANT


def _find_uniform(results: TaskResults) -> list[tuple[Row, Row]]:
    """Return pairs of equal budget, data-dependent rows before uniform ones."""
    pairs = []
    for row in results.rows:
        other = results.find_row(f"uniform masks, rows {row.budget}")
        if row.label == f"recipes.speed({row.budget})" and not row.is_tuned and row.runs and other and other.runs:
            pairs.append((row, other))
    return pairs


def judge_uniform_noise(results: TaskResults) -> Finding | None:
    """Judge the added variance of data-dependent rows beside uniform ones."""
    pairs = [(row, other) for row, other in _find_uniform(results) if row.omegas and other.omegas]
    if not pairs:
        return None
    means = [(row, summarise(row.omegas)[0], summarise(other.omegas)[0]) for row, other in pairs]
    text = ", ".join(f"{ours:.2g} against {theirs:.2g} at {row.budget}" for row, ours, theirs in means)
    return Finding(all(ours < theirs for _, ours, theirs in means), text, min(len(row.runs) for row, _ in pairs))


def judge_uniform_loss(results: TaskResults) -> Finding | None:
    """Judge the loss on test data of data-dependent rows beside uniform ones."""
    compared = {row.budget: compare_rows(results, row, other, "test_loss") for row, other in _find_uniform(results)}
    found = {str(budget): comparison for budget, comparison in compared.items() if comparison is not None}
    if not found:
        return None
    # The best of several budgets is a choice too.
    adjusted = correct_for_many({budget: comparison.p_value for budget, comparison in found.items()})
    best = max(found, key=lambda budget: (_wins(-1.0, adjusted[budget], found[budget]), -found[budget].mean))
    comparison = found[best]
    is_known = comparison.low > 0 or comparison.high < 0
    side = ("lower" if comparison.mean < 0 else "higher") if is_known else "no difference found"
    text = (
        f"{comparison.mean:+.3f} [{comparison.low:+.3f}, {comparison.high:+.3f}] ({side}, {comparison.pairs} seeds), p "
        f"{write_number(adjusted[best], '{:.2g}')} at {best}"
    )
    return Finding(_wins(-1.0, adjusted[best], comparison), text, comparison.pairs)


def judge_theory(results: TaskResults) -> Finding | None:
    """Judge the predicted number of steps to the target; where it was not reached there is nothing to measure."""
    ratios, missed, seeds = [], [], []
    for row, _, found in _list_settings(results):
        reach = measure_reach(results, row)
        if reach.predicted is None:
            continue
        seeds.append(found.pairs)
        if reach.steps_ratio is None:
            missed.append(f"{name_row(row)} ({reach.reached} of {reach.seeds}, predicted {reach.predicted:.2f})")
        else:
            ratios.append(reach.steps_ratio / reach.predicted)
    if not seeds:
        return None
    parts = []
    if ratios:
        parts.append(f"measured ÷ predicted {min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} methods")
    if missed:
        parts.append(f"target missed on some seed, {1 / TARGET_SHARE:.2f} at most: {', '.join(missed)}")
    is_near = all(abs(ratio - 1) <= _PREDICTED_WITHIN for ratio in ratios)
    return Finding(is_near and not missed, "; ".join(parts), min(seeds))
