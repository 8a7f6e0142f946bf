"""Tables of the page that says what to use: every word of advice follows from records."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.experiments.analysis import bytes_share, compare_rows, find_rivals, time_share
from benchmarks.experiments.results import KINDS, Row, TaskResults
from benchmarks.experiments.tables import (
    UNKNOWN,
    name_row,
    say_winner,
    write_interval,
    write_number,
    write_table,
)

# Below this nobody would call two methods different in time.
_SAME_TIME = 0.05
# Who is short of memory wants to halve it at least.
_FEW_BYTES = 0.5
_MEMORY_FAMILIES = ("memory", "both", "checkpoints", "parts", "compiled")
_NO_DIFFERENCE = "either: no difference found"


def write_time_choice(all_results: Sequence[TaskResults]) -> str:
    """Return, for each task, every setting that was run beside the exact methods of equal time, and what is best."""
    rows = []
    for results in all_results:
        for row in list_faster(results):
            rivals = {rival.match_by: rival for rival in find_rivals(results, row)}
            cells = [results.task, name_row(row), write_number(time_share(results, row))]
            cells += [_against(results, row, results.exact)]
            cells += [_against(results, row, rivals.get(by)) for by in ("time, batch", "time, steps")]
            rows.append([*cells, _advise_time(results, row)])
    heads = "task|setting|time|− exact|− smaller batch of equal time|− fewer steps of equal time|use"
    return write_table(heads.split("|"), rows)


def list_faster(results: TaskResults) -> list[Row]:
    """Return the rows of settings that are to save time and that have a smaller batch of equal time beside them."""
    return [
        row
        for row in results.rows
        if row.family == "speed"
        and row.runs
        and any(rival.match_by == "time, batch" for rival in find_rivals(results, row))
    ]


def _advise_time(results: TaskResults, row: Row) -> str:
    time = time_share(results, row)
    if time is not None and time > 1 - _SAME_TIME:
        return "nothing: no time is saved here"
    winners = _find_winners(results, row)
    lost = [label for label, winner in winners.items() if winner == "the one beside it"]
    if lost:
        return lost[0]
    return row.label if all(winner == "the method" for winner in winners.values()) else _NO_DIFFERENCE


def _find_winners(results: TaskResults, row: Row) -> dict[str, str]:
    comparisons = [(rival, compare_rows(results, row, rival)) for rival in find_rivals(results, row)]
    return {rival.label: say_winner(results, found) for rival, found in comparisons if found is not None}


def write_memory_choice(all_results: Sequence[TaskResults]) -> str:
    """Return, for each task, what holds fewer bytes and what it costs."""
    rows = []
    for results in all_results:
        for row in _list_smaller(results):
            cells = [results.task, row.label, write_number(bytes_share(results, row))]
            cells += [write_number(time_share(results, row)), _against(results, row, results.exact)]
            rows.append(cells)
    return write_table(["task", "method", "bytes held", "time", "− exact"], rows)


def _list_smaller(results: TaskResults) -> list[Row]:
    return [
        row
        for row in results.rows
        if row.runs and not row.is_tuned and (row.match_by == "bytes, batch" or row.family in _MEMORY_FAMILIES)
    ]


def write_situations(all_results: Sequence[TaskResults]) -> str:
    """Return one line of advice for each kind of network and each shortage, with the figures that it rests on."""
    rows = []
    for kind in KINDS:
        tasks = [results for results in all_results if results.kind == kind and results.exact.runs]
        # Small networks on small pictures say little where larger ones were trained.
        tasks = [results for results in tasks if not results.is_quick] or tasks
        for results in tasks:
            rows.append([f"time is short, {results.task}", *_sum_up_time(results)])
            rows.append([f"memory is short, {results.task}", *_sum_up_memory(results)])
    return write_table(["your situation is like", "what to use", "because"], rows)


def _sum_up_time(results: TaskResults) -> tuple[str, str]:
    settings = [row for row in list_faster(results) if not row.is_tuned]
    advised = {row.label: _advise_time(results, row) for row in settings}
    if not settings:
        return "not known", "no setting has been trained beside its smaller batch"
    if all(advice.startswith("nothing") for advice in advised.values()):
        return "a smaller batch, or fewer steps", "no setting makes a step faster"
    winners = [row for row in settings if advised[row.label] == row.label]
    if winners:
        best = min(winners, key=lambda row: time_share(results, row) or 1.0)
        return f"`{best.label}`", "better than both exact methods of equal time: " + _tell(results, best)
    either = [row for row in settings if advised[row.label] == _NO_DIFFERENCE]
    if either:
        best = min(either, key=lambda row: time_share(results, row) or 1.0)
        return f"a smaller batch, or `{best.label}`", "not better than both beyond doubt: " + _tell(results, best)
    best = next(row for row in settings if not advised[row.label].startswith("nothing"))
    return "a smaller batch, or fewer steps", "an exact method of equal time is better: " + _tell(results, best)


def _tell(results: TaskResults, row: Row) -> str:
    unit = "in loss" if results.is_text else "points"
    names = {"time, batch": "the smaller batch", "time, steps": "fewer steps"}
    against = ", ".join(
        f"{_against(results, row, rival)} {unit} against {names[rival.match_by]}"
        for rival in find_rivals(results, row)
        if rival.match_by in names
    )
    return f"{row.label} takes {write_number(time_share(results, row))} of the time; {against}"


def _sum_up_memory(results: TaskResults) -> tuple[str, str]:
    fair = []
    for row in _list_smaller(results):
        share, time, found = (
            bytes_share(results, row),
            time_share(results, row),
            compare_rows(results, row, results.exact),
        )
        if share is None or time is None or found is None or share > _FEW_BYTES:
            continue
        if say_winner(results, found) != "the one beside it":
            fair.append((time, share, row.label))
    if not fair:
        return "not known", "nothing that holds half the bytes or fewer has been trained without loss"
    fair.sort()
    figures = "; ".join(f"{label}: {share:.2f} of the bytes in {time:.2f} of the time" for time, share, label in fair)
    return f"`{fair[0][2]}`", f"the fastest that holds half the bytes or fewer with no loss found. {figures}"


def _against(results: TaskResults, row: Row, other: Row | None) -> str:
    return UNKNOWN if other is None else write_interval(results, compare_rows(results, row, other))
