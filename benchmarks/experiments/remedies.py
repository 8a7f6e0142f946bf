"""What was tried where noise costs too much, each remedy beside the smaller batch that takes as long."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.experiments.analysis import compare_rows, find_rival, time_share
from benchmarks.experiments.results import Row, TaskResults
from benchmarks.experiments.tables import UNKNOWN, name_row, write_interval, write_number, write_omega, write_table


def write_remedies(all_results: Sequence[TaskResults]) -> str:
    """Return, for each task where a remedy was run, the plain settings and the remedies."""
    rows = []
    for results in all_results:
        tried = [row for row in results.rows if row.runs and _is_remedy(row)]
        plain = [row for row in results.rows if row.runs and row.family == "speed" and not _is_remedy(row)]
        for row in [*plain, *tried] if tried else []:
            rival = find_rival(results, row)
            comparison = None if rival is None else compare_rows(results, row, rival)
            rows.append(
                [
                    results.task,
                    name_row(row),
                    write_number(time_share(results, row)),
                    write_omega(row),
                    write_interval(results, compare_rows(results, row, results.exact)),
                    UNKNOWN if comparison is None else write_interval(results, comparison),
                ]
            )
    heads = "task|setting|time|ω|− exact|− smaller batch of equal time"
    return write_table(heads.split("|"), rows)


def _is_remedy(row: Row) -> bool:
    is_ours = row.family in {"speed", "controller"} or row.label.startswith("plan(")
    return is_ours and (row.exact_share > 0 or row.is_adaptive or row.is_tuned)
