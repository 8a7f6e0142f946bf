"""Tables of the documentation, from records alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks.experiments.analysis import (
    bytes_share,
    compare_all,
    compare_rows,
    find_rival,
    find_rivals,
    is_shorter,
    list_distinct,
    measure_reach,
    metric_of,
    time_share,
)
from benchmarks.experiments.equivalent import Equivalent, measure_equivalent
from benchmarks.experiments.results import Row, TaskResults
from benchmarks.experiments.statistics import Comparison, summarise

UNKNOWN = "–"
_ONLY_COSTS = "No training has been made; what a step costs was measured."


def write_task(results: TaskResults) -> str:
    """Return everything about one task: what was run, the table of methods, what is missing, and the picture."""
    seeds = max((len(row.runs) for row in results.rows), default=0)
    lines = [
        f"### {results.task}",
        "",
        f"{_capital(results.network)}; data: {results.data} (train + validation + test, checksum).",
    ]
    if results.exact.runs:
        lines.append(_describe_runs(results, seeds))
    lines += ["", f"![{results.task}](img/experiments_{results.slug}.png)" if seeds else _ONLY_COSTS, ""]
    if seeds:
        parts = [_write_methods(results), _write_reach(results), _write_rivals(results), _write_missing(results)]
        return "\n".join([*lines, "\n\n".join(filter(None, parts)), ""])
    return "\n".join([*lines, _write_costs(results), ""])


def _describe_runs(results: TaskResults, seeds: int) -> str:
    run, seconds = results.exact.declaration, list(results.exact.collect("training_cpu_seconds").values())
    words = [
        f"{run['steps']} steps on batches of {run['batch_size']} ({summarise(seconds)[0]:.0f} processor seconds of "
        f"exact training), up to {seeds} seeds"
    ]
    for name, before in (("processor", ""), ("torch", "PyTorch "), ("commit", "commit ")):
        words.append(before + ", ".join(sorted({environment[name] for environment in results.environments})))
    return "; ".join(words) + "."


def _write_methods(results: TaskResults) -> str:
    figure = "test loss" if results.is_text else "test accuracy, %"
    compared = compare_all(results)
    rows = []
    for row in list_distinct(results.rows):
        comparison, p_value = compared.get((row.label, row.is_tuned), (None, None))
        if row.is_ruler:
            comparison = compare_rows(results, row, results.exact)
        rows.append(
            [
                name_all(results, row),
                write_number(row.declaration["learning_rate"], "{:g}"),
                str(row.declaration["batch_size"]),
                str(row.declaration["steps"]),
                str(len(row.runs)),
                write_number(time_share(results, row)),
                write_number((row.costs or {}).get("backward_ratio")),
                write_number(bytes_share(results, row)),
                write_omega(row),
                _spread(results, row),
                write_interval(results, comparison),
                write_number(p_value, "{:.2g}"),
            ]
        )
    heads = "method|rate|batch|steps|seeds|time|backward|bytes held|ω|" + figure + "|− exact [95 %]|p (Holm)"
    return write_table(heads.split("|"), rows)


def _write_costs(results: TaskResults) -> str:
    rows = [
        [
            name_row(row),
            *[write_number(row.costs.get(name)) for name in ("ratio", "ratio_spread", "backward_ratio", "held_share")],
        ]
        for row in results.rows
        if row.costs is not None
    ]
    return write_table(["method", "time", "± quartiles", "backward", "bytes held"], rows)


def _write_reach(results: TaskResults) -> str:
    rows = []
    for row in list_distinct(results.rows):
        if row is results.exact or row.is_tuned:
            continue
        reach, rival = measure_reach(results, row), find_rival(results, row)
        rows.append(
            [
                name_all(results, row),
                write_number(reach.steps_ratio),
                f"{len(reach.ratios)} of {len(reach.seeds)}",
                write_number(reach.predicted),
                write_number(reach.noise_dominated),
                # Exact trainings of fewer steps are the ruler.
                UNKNOWN if is_shorter(row) else write_equivalent(measure_equivalent(results, row)),
                write_number(reach.time_ratio),
                write_number(None if rival is None else measure_reach(results, rival).time_ratio),
            ]
        )
    heads = (
        "method|steps to target ÷ exact|reached|predicted|1 + ω|steps ÷ exact of equal end|time to target ÷ exact|the "
        "smaller batch: its time to target ÷ exact"
    )
    return write_table(heads.split("|"), rows)


def write_equivalent(found: Equivalent | None) -> str:
    """Return a ratio of steps with its interval, no further than the ruler reaches."""
    if found is None:
        return UNKNOWN

    def write(value: float) -> str:
        if value > found.longest:
            return f"> {found.longest:.2f}"
        return "< 1" if value < 1 and f"{value:.2f}" != "1.00" else f"{value:.2f}"

    return f"{write(found.ratio)} [{write(found.low)}, {write(found.high)}]"


def _write_rivals(results: TaskResults) -> str:
    pairs: dict[tuple[tuple[str, ...], ...], list[tuple[Row, Row]]] = {}
    for row in results.rows:
        for rival in find_rivals(results, row):
            pairs.setdefault((row.run_ids, rival.run_ids), []).append((row, rival))
    rows = []
    for same in pairs.values():
        row, rival = same[0]
        comparison = compare_rows(results, row, rival)
        if comparison is not None:
            cells = [_join(row for row, _ in same), write_number(time_share(results, row))]
            cells += [_join(rival for _, rival in same), write_number(time_share(results, rival))]
            cells += [str(comparison.pairs), write_interval(results, comparison)]
            cells += [write_number(comparison.p_value, "{:.2g}"), say_winner(results, comparison)]
            rows.append(cells)
    heads = "method|time|made equal to it|its time|seeds|difference [95 %]|p|better"
    return write_table(heads.split("|"), rows)


def say_winner(results: TaskResults, comparison: Comparison) -> str:
    """Return which of two methods is better, where the interval leaves no doubt."""
    if comparison.low <= 0 <= comparison.high or comparison.pairs < 2:
        return "no difference found"
    is_first = (comparison.mean > 0) != results.is_text
    return "the method" if is_first else "the one beside it"


def say_difference(results: TaskResults, comparison: Comparison) -> str:
    """Return a difference with its interval, for whom it speaks, and how many seeds say so."""
    sides = {"the method": "better", "the one beside it": "worse"}
    winner = say_winner(results, comparison)
    return f"{write_interval(results, comparison)} ({sides.get(winner, winner)}, {count_seeds(comparison)})"


def count_seeds(comparison: Comparison) -> str:
    """Return the number of pairs in words."""
    return f"{comparison.pairs} seed" + "s" * (comparison.pairs != 1)


def _write_missing(results: TaskResults) -> str:
    parts = []
    if results.left_out:
        parts.append(f"Recorded, and in no row any more: {'; '.join(results.left_out)}.")
    own = [row for row in results.rows if not row.is_tuned]
    unavailable = [f"{row.label} ({row.unavailable})" for row in own if row.unavailable]
    declared = [row for row in own if row.is_declared]
    missing = sum(not row.runs and not row.unavailable for row in declared)
    if missing:
        parts.append(
            f"{missing} of {len(declared)} methods have not been trained on this task; `{results.command}` trains "
            f"them, and the same with `--list` names them."
        )
    if unavailable:
        parts.append(f"Not available here: {'; '.join(unavailable)}.")
    return "\n\n".join(parts)


def write_interval(results: TaskResults, comparison: Comparison | None) -> str:
    """Return a difference with its interval: points of accuracy, or loss."""
    if comparison is None:
        return UNKNOWN
    write: Callable[[float], str] = "{:+.3f}".format if results.is_text else "{:+.2f}".format
    if comparison.pairs < 2:
        return write(comparison.mean)
    return f"{write(comparison.mean)} [{write(comparison.low)}, {write(comparison.high)}]"


def write_counted(results: TaskResults, comparison: Comparison | None) -> str:
    """Return a difference with its interval and how many seeds say so."""
    return UNKNOWN if comparison is None else f"{write_interval(results, comparison)}, {count_seeds(comparison)}"


def _spread(results: TaskResults, row: Row) -> str:
    values = list(row.collect(metric_of(results)).values())
    if not values:
        return "diverged"
    scale, form = (1.0, "{:.3f}") if results.is_text else (100.0, "{:.2f}")
    mean, deviation = summarise([scale * value for value in values])
    # A single seed has no deviation.
    return form.format(mean) + (f" ± {form.format(deviation)}" if len(values) > 1 else "")


def write_omega(row: Row) -> str:
    """Return the mean added variance."""
    omegas = row.omegas
    return f"{summarise(omegas)[0]:.3g}" if omegas else UNKNOWN


def name_row(row: Row) -> str:
    """Return what tables call a row."""
    return row.label + (", own rate" if row.is_tuned else "")


def name_all(results: TaskResults, row: Row) -> str:
    """Return the names of all rows that share the runs of a row."""
    return _join(each for each in results.rows if each is row or (each.runs and each.run_ids == row.run_ids))


def _join(rows: Iterable[Row]) -> str:
    return "<br>= ".join(dict.fromkeys(map(name_row, rows)))


def write_number(value: float | None, form: str = "{:.2f}") -> str:
    """Return a figure, or a dash where there is none."""
    return UNKNOWN if value is None or value != value else form.format(value)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def write_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; nothing where there are no rows."""
    if not rows:
        return ""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
