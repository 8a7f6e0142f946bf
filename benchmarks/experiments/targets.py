"""What the experiments were to show, and what they do show: a table from records alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.experiments.analysis import (
    bytes_share,
    compare_rows,
    find_rival,
    measure_reach,
    time_share,
    time_to_target,
)
from benchmarks.experiments.choices import list_faster
from benchmarks.experiments.results import KINDS, Row, TaskResults
from benchmarks.experiments.statistics import Comparison, correct_for_many, summarise
from benchmarks.experiments.tables import name_row, say_winner, write_interval, write_number, write_table

_SEEDS = 5
_SIGNIFICANT = 0.05
_FASTER_STEP, _POINTS_BELOW, _WORST_COST = 1.4, 0.3, 0.75
_FEWER_BYTES = 4.0
_FASTER_TO_TARGET = 1.25


_Judge = Callable[[TaskResults], "Finding | None"]


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


def write_targets(all_results: Sequence[TaskResults]) -> str:
    """Return a table: what was asked for, what was found on each task, and whether that is enough."""
    tasks = [results for results in all_results if not results.is_quick and results.exact.runs]
    mlp, images = ["MLP"], ["ViT", "BagNet"]
    lines = [
        (
            "MLP, width ≥ 1024",
            "accuracy ≥ 98.0 %, at most 0.2 points below exact, backward ≥ 2 times faster",
            _collect([results for results in tasks if "wide" in results.task], mlp, _judge_backward),
            1,
        ),
        (
            "ViT and BagNet",
            "a step ≥ 1.4 times faster, at most 0.3 points below exact, c (1 + ω) ≤ 0.75 at every point",
            _collect(tasks, images, _judge_speed),
            2,
        ),
        (
            "memory recipe, 4 bits",
            "no difference to exact found, bytes held ≥ 4 times fewer, on all four",
            _collect(tasks, KINDS, _judge_memory),
            4,
        ),
        (
            "time to the target",
            "≥ 1.25 times faster than exact on two of four, beside the smaller batch",
            _collect(tasks, KINDS, _judge_time),
            2,
        ),
        (
            "equal-cost frontier",
            "better than the smaller batch of equal time (p < 0.05) on two of four",
            _collect(tasks, KINDS, _judge_frontier),
            2,
        ),
        (
            "data-dependent against uniform: ω",
            "lower at equal budget on all four",
            _collect(tasks, KINDS, _judge_uniform_noise),
            4,
        ),
        (
            "data-dependent against uniform: loss",
            "lower test loss (p < 0.05) on two of four",
            _collect(tasks, KINDS, _judge_uniform_loss),
            2,
        ),
        (
            "theory",
            "steps to the target predicted and measured on all four",
            _collect(tasks, KINDS, _judge_theory),
            4,
        ),
    ]
    rows = [
        [what, asked, "<br>".join(f"{name}: {found.text}" for name, found in findings) or "–", _say(findings, needed)]
        for what, asked, findings, needed in lines
    ]
    return write_table(["what", "asked", "found", "state"], rows)


def _collect(tasks: Sequence[TaskResults], kinds: Sequence[str], judge: _Judge) -> list[tuple[str, Finding]]:
    """Return what is found on each task of these kinds, where something was run."""
    found = [(results.task, judge(results)) for results in tasks if results.kind in kinds]
    return [(name, finding) for name, finding in found if finding is not None]


def _say(findings: Sequence[tuple[str, Finding]], needed: int) -> str:
    if not findings:
        return "not run"
    kinds = {next(kind for kind in KINDS if kind in name) for name, finding in findings if finding.is_reached}
    judged = {next(kind for kind in KINDS if kind in name) for name, _ in findings}
    seeds = min(finding.seeds for _, finding in findings)
    few = f", with {seeds} seeds" if seeds < _SEEDS else ""
    if len(kinds) >= needed:
        return f"reached{few}"
    state = "not reached" if len(judged) >= needed else "not run on all"
    return f"{state}: {len(kinds)} of {needed}{few}"


def _list_settings(results: TaskResults) -> list[tuple[Row, float, Comparison]]:
    """Return unbiased methods of our own whose step time is known, with their difference to exact training."""
    found = []
    for row in results.rows:
        time, comparison = time_share(results, row), compare_rows(results, row, results.exact)
        if row is results.exact or row.is_biased or row.match_label or time is None or comparison is None:
            continue
        if row.omegas:
            found.append((row, time, comparison))
    return found


def _judge_backward(results: TaskResults) -> Finding | None:
    def meet(row: Row, comparison: Comparison) -> list[bool]:
        backward = row.costs["backward_ratio"] if row.costs else 1.0
        return [_accuracy(row) >= 98.0, comparison.mean >= -0.2, backward <= 0.5]

    found = [(row, comparison) for row, _, comparison in _list_settings(results) if row.costs]
    if not found:
        return None
    row, comparison = max(found, key=lambda each: (sum(meet(*each)), each[1].mean))
    faster = 1 / row.costs["backward_ratio"] if row.costs else 1.0
    text = f"{_accuracy(row):.2f} %, {write_interval(results, comparison)}, backward {faster:.1f}× ({name_row(row)})"
    return Finding(all(meet(row, comparison)), text, comparison.pairs)


def _accuracy(row: Row) -> float:
    return 100 * summarise(list(row.collect("test_accuracy").values()))[0]


def _judge_speed(results: TaskResults) -> Finding | None:
    def meet(row: Row, time: float, comparison: Comparison) -> list[bool]:
        is_cheap = time * (1 + (row.worst_omega or 0.0)) <= _WORST_COST
        return [time <= 1 / _FASTER_STEP, comparison.mean >= -_POINTS_BELOW, is_cheap]

    found = _list_settings(results)
    if not found:
        return None
    row, time, comparison = max(found, key=lambda each: (sum(meet(*each)), -each[1]))
    worst = time * (1 + (row.worst_omega or 0.0))
    text = f"{1 / time:.2f}×, {write_interval(results, comparison)}, c (1 + ω) ≤ {worst:.2f} ({name_row(row)})"
    return Finding(all(meet(row, time, comparison)), text, comparison.pairs)


def _judge_memory(results: TaskResults) -> Finding | None:
    row = results.find_row("recipes.memory(4)")
    share = bytes_share(results, row) if row is not None else None
    comparison = compare_rows(results, row, results.exact) if row is not None else None
    if share is None or comparison is None:
        return None
    is_as_good = say_winner(results, comparison) != "the one beside it"
    text = f"{1 / share:.1f}× fewer bytes, {write_interval(results, comparison)}"
    return Finding(is_as_good and share <= 1 / _FEWER_BYTES, text, comparison.pairs)


def _judge_time(results: TaskResults) -> Finding | None:
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


def _judge_frontier(results: TaskResults) -> Finding | None:
    found: dict[str, tuple[Row, Comparison]] = {}
    for row in list_faster(results):
        rival = find_rival(results, row)
        comparison = compare_rows(results, row, rival) if rival is not None else None
        if comparison is not None:
            found[name_row(row)] = (row, comparison)
    if not found:
        return None
    # The best of several settings is a choice: its p-value answers for all of them.
    adjusted = correct_for_many({name: comparison.p_value for name, (_, comparison) in found.items()})
    sign = -1.0 if results.is_text else 1.0
    best = max(found, key=lambda name: (_wins(sign, adjusted[name], found[name][1]), sign * found[name][1].mean))
    row, comparison = found[best]
    text = f"{write_interval(results, comparison)}, p {write_number(adjusted[best], '{:.2g}')} ({best})"
    return Finding(_wins(sign, adjusted[best], comparison), text, comparison.pairs)


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


def _judge_uniform_noise(results: TaskResults) -> Finding | None:
    pairs = [(row, other) for row, other in _find_uniform(results) if row.omegas and other.omegas]
    if not pairs:
        return None
    means = [(row, summarise(row.omegas)[0], summarise(other.omegas)[0]) for row, other in pairs]
    text = ", ".join(f"{ours:.2g} against {theirs:.2g} at {row.budget}" for row, ours, theirs in means)
    return Finding(all(ours < theirs for _, ours, theirs in means), text, min(len(row.runs) for row, _ in pairs))


def _judge_uniform_loss(results: TaskResults) -> Finding | None:
    found = [(row, compare_rows(results, row, other, "test_loss")) for row, other in _find_uniform(results)]
    known = [(row, comparison) for row, comparison in found if comparison is not None]
    if not known:
        return None
    row, comparison = min(known, key=lambda each: each[1].p_value)
    text = (
        f"{comparison.mean:+.3f} [{comparison.low:+.3f}, {comparison.high:+.3f}], p "
        f"{write_number(comparison.p_value, '{:.2g}')} at {row.budget}"
    )
    return Finding(_wins(-1.0, comparison.p_value, comparison), text, comparison.pairs)


def _judge_theory(results: TaskResults) -> Finding | None:
    ratios = []
    for row, _, _ in _list_settings(results):
        reach = measure_reach(results, row)
        if reach.steps_ratio is not None and reach.predicted is not None:
            ratios.append(reach.steps_ratio / reach.predicted)
    if not ratios:
        return None
    text = f"measured ÷ predicted {min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} methods"
    return Finding(True, text, min(len(row.runs) for row, _, _ in _list_settings(results)))


def _call(row: Row) -> str:
    return row.label + (", own rate" if row.is_tuned else "")
