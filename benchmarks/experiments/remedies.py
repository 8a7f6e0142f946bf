"""What was tried where noise costs too much, each remedy beside the smaller batch that takes as long."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.experiments.analysis import bytes_share, compare_rows, find_rival, list_distinct, time_share
from benchmarks.experiments.methods import FIRST_EXACT, IN_STEPS, SMALL_TOO
from benchmarks.experiments.results import Row, TaskResults
from benchmarks.experiments.tables import name_all, write_counted, write_number, write_omega, write_table

# What may help, and how to tell it.
_KINDS: tuple[tuple[str, Callable[[Row], bool]], ...] = (
    ("exact gradients for the first fifth of the steps", lambda row: row.label.endswith("first 20 % exact")),
    ("exact gradients for the last fifth", lambda row: row.label.endswith("last 20 % exact")),
    ("a controller of constant target", lambda row: row.family == "controller" and " to " not in row.label),
    ("a controller whose target falls", lambda row: row.family == "controller" and " to " in row.label),
    ("a plan", lambda row: row.label.startswith("plan(") and not row.label.endswith(IN_STEPS)),
    (f"a plan {IN_STEPS}", lambda row: row.label.endswith(IN_STEPS)),
    ("codes in small layers too", lambda row: row.label == SMALL_TOO),
    ("codes in small layers too, none of the batch itself", lambda row: row.label == FIRST_EXACT),
    ("a learning rate of its own", lambda row: row.is_tuned and row.family == "speed"),
)


def write_remedies(all_results: Sequence[TaskResults]) -> str:
    """Return what was tried on which tasks, and for each of these the plain settings and the remedies."""
    rows = []
    for results in all_results:
        tried = _list_tried(results)
        plain = [row for row in results.rows if row.family in {"speed", "memory"} and not _is_remedy(row)]
        # A remedy that turned out to be the plain setting, such as the same rate chosen again, shares its line.
        for row in list_distinct([*plain, *tried]) if tried else []:
            rival = find_rival(results, row)
            rows.append(
                [
                    results.task,
                    name_all(results, row),
                    write_number(time_share(results, row)),
                    write_number(bytes_share(results, row)),
                    write_omega(row),
                    write_counted(results, compare_rows(results, row, results.exact)),
                    write_counted(results, None if rival is None else compare_rows(results, row, rival)),
                ]
            )
    heads = "task|setting|time|bytes held|ω|− exact|− smaller batch of equal time"
    return "\n\n".join(part for part in (_say_tried(all_results), write_table(heads.split("|"), rows)) if part)


def _say_tried(all_results: Sequence[TaskResults]) -> str:
    tried, not_tried = [], []
    for words, is_kind in _KINDS:
        tasks = [results.task for results in all_results if any(map(is_kind, _list_tried(results)))]
        if tasks:
            tried.append(f"{words} ({', '.join(tasks)})")
        else:
            not_tried.append(words)
    if not tried:
        return ""
    return f"Tried: {'; '.join(tried)}." + (f" Not tried yet: {'; '.join(not_tried)}." if not_tried else "")


def _list_tried(results: TaskResults) -> list[Row]:
    return [row for row in results.rows if row.runs and _is_remedy(row)]


def _is_remedy(row: Row) -> bool:
    # The names of what is made equal to a remedy end as its own does.
    return not row.match_label and any(is_kind(row) for _, is_kind in _KINDS)
