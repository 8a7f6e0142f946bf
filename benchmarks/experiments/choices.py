"""Tables of the page that says what to use: every word of advice follows from records."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

from benchmarks.experiments.analysis import (
    bytes_share,
    compare_rows,
    find_rival,
    find_rivals,
    list_distinct,
    time_share,
)
from benchmarks.experiments.results import KINDS, Row, TaskResults
from benchmarks.experiments.statistics import Comparison, correct_for_many
from benchmarks.experiments.tables import (
    count_seeds,
    name_all,
    say_winner,
    write_counted,
    write_interval,
    write_number,
    write_table,
)

# Below this nobody would call two methods different in time.
_SAME_TIME = 0.05
# Nor in bytes.
_SAME_BYTES = 0.05
_SIGNIFICANT = 0.05
# Fewer pairs have intervals that hide any loss.
_FEWEST_PAIRS = 3
_NOT_CORRECTED = "the method, but not after Holm's correction"
# Who is short of memory wants to halve it at least.
_FEW_BYTES = 0.5
_MEMORY_FAMILIES = (
    "memory",
    "memory, small layers too",
    "memory, first layer exact",
    "both",
    "checkpoints",
    "parts",
    "compiled",
)
# Exact ways to hold less; a random one has to be faster than these.
_EXACT_FAMILIES = {"checkpoints": "checkpoints", "parts": "micro-batches"}
_RIVALS = {"time, batch": "the smaller batch", "time, steps": "fewer steps"}


class Verdict(enum.Enum):
    """What a setting is worth beside the exact methods of equal time."""

    NOTHING = "no time is saved"
    WORSE = "an exact method of equal time is better"
    OPEN = "no difference to one of them is found"
    BETTER_THAN_ONE = "better than the only one that was run"
    BETTER = "better than both"


def write_time_choice(all_results: Sequence[TaskResults]) -> str:
    """Return, for each task, every setting that was run beside the exact methods of equal time, and what is best."""
    rows, shown = [], []
    for results in all_results:
        for row in list_faster(results):
            rivals = {rival.match_by: rival for rival in find_rivals(results, row)}
            cells = [results.task, name_all(results, row), write_number(time_share(results, row))]
            cells += [write_number(bytes_share(results, row)), _against(results, row, results.exact)]
            cells += [_against(results, row, rivals.get(by)) for by in _RIVALS]
            rows.append([*cells, _advise_time(results, row)])
            shown.append(results)
    heads = "task|setting|time|bytes held|− exact|− smaller batch of equal time|− fewer steps of equal time|use"
    absent = _name_absent(all_results, shown, "no setting has been trained beside its smaller batch")
    return _join(write_table(heads.split("|"), rows), absent)


def list_faster(results: TaskResults) -> list[Row]:
    """Return the rows of settings that are to save time and that have a smaller batch of equal time beside them.

    Of those that share their runs, and the runs of the smaller batch, the first.
    """
    distinct: dict[tuple[tuple[str, ...], tuple[str, ...]], Row] = {}
    for row in results.rows:
        batch = find_rival(results, row)
        if row.family == "speed" and row.runs and batch is not None:
            # The pass with rates of their own has fewer exact methods beside it; where it chose alike, it adds nothing.
            distinct.setdefault((row.run_ids, batch.run_ids), row)
    return list(distinct.values())


def saves_time(results: TaskResults, row: Row) -> bool:
    """Tell whether a training takes less time than an exact one, by more than nobody would notice."""
    time = time_share(results, row)
    return time is not None and time <= 1 - _SAME_TIME


def judge_setting(results: TaskResults, row: Row) -> Verdict:
    """Return what a setting is worth; better than both it is only where both were run.

    What is recommended among all settings of a task has to stand among them all: it is better by Holm's p-values over
    every comparison of a setting that saves time with an exact method of equal time. Worse it is by the interval alone.
    """
    if not saves_time(results, row):
        return Verdict.NOTHING
    winners = _find_winners(results, row).values()
    if "the one beside it" in winners:
        return Verdict.WORSE
    if any(winner != "the method" for winner in winners):
        return Verdict.OPEN
    return Verdict.BETTER_THAN_ONE if _list_not_run(results, row) else Verdict.BETTER


def _advise_time(results: TaskResults, row: Row) -> str:
    verdict, not_run = judge_setting(results, row), _list_not_run(results, row)
    if verdict is Verdict.NOTHING:
        return "nothing: no time is saved here"
    if verdict is Verdict.WORSE:
        return next(label for label, winner in _find_winners(results, row).items() if winner == "the one beside it")
    words = row.label
    if verdict is Verdict.OPEN:
        found = compare_rows(results, row, results.exact)
        is_better = set(_find_winners(results, row).values()) <= {"the method", _NOT_CORRECTED}
        what = "better by the intervals, not after Holm's correction," if is_better else "no difference found"
        words = f"either: {what}" + (f" with {count_seeds(found)}" if found is not None else "")
    return "; ".join([words, *(f"{name} not run" for name in not_run)])


def _find_winners(results: TaskResults, row: Row) -> dict[str, str]:
    """Return which of the two is better, for every exact method of equal time."""
    adjusted = correct_for_many({key: found.p_value for key, found in _compare_all(results).items()})
    winners = {}
    for rival in find_rivals(results, row):
        found = compare_rows(results, row, rival)
        if found is not None and rival.match_by in _RIVALS:
            winner, stands = say_winner(results, found), adjusted.get(_name_pair(row, rival), math.nan) < _SIGNIFICANT
            winners[rival.label] = winner if stands or winner != "the method" else _NOT_CORRECTED
    return winners


def _compare_all(results: TaskResults) -> dict[str, Comparison]:
    """Return all comparisons that a choice is made by; those of the same runs count once."""
    compared = {}
    for row in list_faster(results):
        for rival in find_rivals(results, row) if saves_time(results, row) else []:
            found = compare_rows(results, row, rival)
            if found is not None and rival.match_by in _RIVALS:
                compared[_name_pair(row, rival)] = found
    return compared


def _name_pair(row: Row, rival: Row) -> str:
    return " ".join((*row.run_ids, "against", *rival.run_ids))


def _list_not_run(results: TaskResults, row: Row) -> list[str]:
    """Return the exact methods of equal time that a setting was not compared with."""
    rivals = {rival.match_by: rival for rival in find_rivals(results, row)}
    compared = {by for by, rival in rivals.items() if compare_rows(results, row, rival) is not None}
    return [name for by, name in _RIVALS.items() if by not in compared]


def _name_absent(all_results: Sequence[TaskResults], shown: Sequence[TaskResults], why: str) -> str:
    absent = [results.task for results in all_results if results not in shown]
    return f"Not shown, because {why}: {', '.join(absent)}." if absent else ""


def _join(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


def write_memory_choice(all_results: Sequence[TaskResults]) -> str:
    """Return, for each task, what holds fewer bytes and what it costs."""
    rows, shown = [], []
    for results in all_results:
        for row in _list_smaller(results):
            shown.append(results)
            cells = [results.task, name_all(results, row), write_number(bytes_share(results, row))]
            cells += [write_number(time_share(results, row)), _against(results, row, results.exact)]
            rows.append(cells)
    absent = _name_absent(all_results, shown, "nothing that is to hold fewer bytes has been trained")
    return _join(write_table(["task", "method", "bytes held", "time", "− exact"], rows), absent)


def _list_smaller(results: TaskResults) -> list[Row]:
    return [
        row
        for row in list_distinct(results.rows)
        if not row.is_tuned and (row.match_by == "bytes, batch" or row.family in _MEMORY_FAMILIES)
    ]


def write_situations(all_results: Sequence[TaskResults]) -> str:
    """Return one line of advice for each kind of network and each shortage, with the figures that it rests on."""
    rows, shown = [], []
    trained = [results for results in all_results if results.exact.runs]
    for kind in KINDS:
        tasks = [results for results in trained if results.kind == kind]
        # Small networks on small pictures say little where larger ones were trained.
        tasks = [results for results in tasks if not results.is_quick] or tasks
        for results in tasks:
            rows.append([f"time is short, {results.task}", *_sum_up_time(results)])
            rows.append([f"memory is short, {results.task}", *_sum_up_memory(results)])
        shown += tasks
    return _join(
        write_table(["your situation is like", "what to use", "because"], rows),
        _name_absent(all_results, trained, "no training has been recorded"),
        _name_absent(trained, shown, "a larger network of the same kind is"),
    )


def _sum_up_time(results: TaskResults) -> tuple[str, str]:
    settings = [(judge_setting(results, row), row) for row in list_faster(results) if not row.is_tuned]
    settings.sort(key=lambda each: time_share(results, each[1]) or 1.0)
    fastest = dict(reversed(settings))
    if not settings:
        return "not known", "no setting has been trained beside its smaller batch"
    if (best := fastest.get(Verdict.BETTER)) is not None:
        return f"`{best.label}`", "better than both exact methods of equal time: " + _tell(results, best)
    if (best := fastest.get(Verdict.BETTER_THAN_ONE)) is not None:
        not_run = ", ".join(_list_not_run(results, best))
        return f"`{best.label}`", f"better than the smaller batch; {not_run} not run: {_tell(results, best)}"
    if (best := fastest.get(Verdict.OPEN)) is not None:
        return f"a smaller batch, or `{best.label}`", "not better than both beyond doubt: " + _tell(results, best)
    if (best := fastest.get(Verdict.WORSE)) is not None:
        return "a smaller batch, or fewer steps", "an exact method of equal time is better: " + _tell(results, best)
    return "a smaller batch, or fewer steps", "no setting makes a step faster"


def _tell(results: TaskResults, row: Row) -> str:
    unit = "in loss" if results.is_text else "points"
    against = []
    for rival in find_rivals(results, row):
        found = compare_rows(results, row, rival)
        if found is not None and rival.match_by in _RIVALS:
            difference = f"{write_interval(results, found)} {unit} against {_RIVALS[rival.match_by]}"
            against.append(f"{difference} ({count_seeds(found)})")
    costs = f"{write_number(time_share(results, row))} of the time"
    share = bytes_share(results, row)
    if share is not None and share > 1 + _SAME_BYTES:
        costs += f" and holds {share:.2f} of the bytes, more than exact training"
    found = compare_rows(results, row, results.exact)
    if found is not None:
        against.append(f"{write_interval(results, found)} against exact training of all steps")
    return f"{row.label} takes {costs}; {', '.join(against)}"


def _sum_up_memory(results: TaskResults) -> tuple[str, str]:
    fair = []
    for row in _list_smaller(results):
        share, time, found = (
            bytes_share(results, row),
            time_share(results, row),
            compare_rows(results, row, results.exact),
        )
        if share is None or time is None or found is None or found.pairs < _FEWEST_PAIRS or share > _FEW_BYTES:
            continue
        if say_winner(results, found) != "the one beside it":
            fair.append((time, share, row.label, f"{write_interval(results, found)} ({count_seeds(found)})"))
    if not fair:
        return "not known", "nothing that holds half the bytes or fewer has been trained without loss"
    fair.sort()
    figures = "; ".join(
        f"{label}: {share:.2f} of the bytes in {time:.2f} of the time, {difference} to exact"
        for time, share, label, difference in fair
    )
    not_run = [name for family, name in _EXACT_FAMILIES.items() if not _is_known(results, family)]
    beside = f". Not run beside it: {' and '.join(not_run)}" if not_run else ""
    return f"`{fair[0][2]}`", f"the fastest that holds half the bytes or fewer with no loss found. {figures}{beside}"


def _is_known(results: TaskResults, family: str) -> bool:
    """Tell whether a family of methods was trained, or cannot be."""
    return any(row.runs or row.unavailable for row in results.rows if row.family == family)


def _against(results: TaskResults, row: Row, other: Row | None) -> str:
    return write_counted(results, None if other is None else compare_rows(results, row, other))
