"""Tables of the documentation, from records alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.experiments.analysis import (
    bytes_share,
    compare_all,
    compare_rows,
    find_rivals,
    measure_reach,
    metric_of,
    time_share,
)
from benchmarks.experiments.results import Row, TaskResults
from benchmarks.experiments.statistics import Comparison, summarise

_UNKNOWN = "–"
_ONLY_COSTS = "No training has been made; what a step costs was measured."
# Below this nobody would call two methods different in time.
_SAME_TIME = 0.05


def write_task(results: TaskResults) -> str:
    """Return everything about one task: what was run, the table of methods, what is missing, and the picture."""
    environment = results.environment
    seeds = max((len(row.runs) for row in results.rows), default=0)
    lines = [
        f"### {results.task}",
        "",
        f"{_capital(results.network)}; data: {results.data} (train + validation + test, checksum).",
    ]
    if environment:
        lines.append(
            f"{results.exact.declaration['steps']} steps on batches of {results.exact.declaration['batch_size']}, "
            f"up to {seeds} seeds; {environment['processor']}, PyTorch {environment['torch']}, commit "
            f"{environment['commit']}."
        )
    lines += [
        "",
        f"![{results.task}](img/experiments_{results.slug}.png)" if seeds else _ONLY_COSTS,
        "",
    ]
    if seeds:
        lines += [_write_methods(results), "", _write_reach(results), "", _write_rivals(results), ""]
        return "\n".join([*lines, _write_missing(results), ""])
    return "\n".join([*lines, _write_costs(results), ""])


def _write_methods(results: TaskResults) -> str:
    figure = "test loss" if results.is_text else "test accuracy, %"
    compared = compare_all(results)
    rows = []
    for row in results.rows:
        if not row.runs:
            continue
        comparison, p_value = compared.get((row.label, row.is_tuned), (None, None))
        rows.append(
            [
                _name(row),
                _number(row.declaration["learning_rate"], "{:g}"),
                str(row.declaration["batch_size"]),
                _number(time_share(results, row)),
                _number(row.costs["backward_ratio"] if row.costs else None),
                _number(bytes_share(results, row)),
                _omega(row),
                _spread(results, row),
                _interval(results, comparison),
                _number(p_value, "{:.2g}"),
            ]
        )
    heads = "method|rate|batch|time|backward|bytes held|ω|" + figure + "|− exact [95 %]|p (Holm)"
    return _table(heads.split("|"), rows)


def _write_costs(results: TaskResults) -> str:
    rows = [
        [_name(row), *[_number(row.costs[name]) for name in ("ratio", "ratio_spread", "backward_ratio", "held_share")]]
        for row in results.rows
        if row.costs is not None
    ]
    return _table(["method", "time", "± quartiles", "backward", "bytes held"], rows)


def _write_reach(results: TaskResults) -> str:
    rows = []
    for row in results.rows:
        if not row.runs or row is results.exact or row.is_tuned:
            continue
        reach, time = measure_reach(results, row), time_share(results, row)
        steps = row.declaration["steps"] / results.exact.declaration["steps"]
        per_step = None if time is None else time / steps
        total = None if reach.steps_ratio is None or per_step is None else reach.steps_ratio * per_step
        rows.append(
            [
                _name(row),
                _number(reach.steps_ratio),
                f"{reach.reached} of {reach.seeds}",
                _number(reach.predicted),
                _number(reach.noise_dominated),
                _number(total),
            ]
        )
    heads = "method|steps to target ÷ exact|reached|predicted|1 + ω|time to target ÷ exact"
    return _table(heads.split("|"), rows)


def _write_rivals(results: TaskResults) -> str:
    rows = []
    for row in results.rows:
        for rival in find_rivals(results, row):
            comparison = compare_rows(results, row, rival)
            if comparison is not None:
                cells = [_interval(results, comparison), _number(comparison.p_value, "{:.2g}")]
                rows.append([_name(row), _name(rival), *cells, say_winner(results, comparison)])
    return _table(["method", "made equal to it", "difference [95 %]", "p", "better"], rows)


def say_winner(results: TaskResults, comparison: Comparison) -> str:
    """Return which of two methods is better, where the interval leaves no doubt."""
    if comparison.low <= 0 <= comparison.high or comparison.pairs < 2:
        return "no difference found"
    is_first = (comparison.mean > 0) != results.is_text
    return "the method" if is_first else "the one beside it"


def _write_missing(results: TaskResults) -> str:
    unavailable = [f"{row.label} ({row.unavailable})" for row in results.rows if row.unavailable]
    missing = [row.label for row in results.rows if not row.runs and not row.unavailable]
    parts = []
    if missing:
        parts.append(f"Not run yet: {', '.join(missing)}. `{results.command}` makes these runs.")
    if unavailable:
        parts.append(f"Not available: {'; '.join(unavailable)}.")
    return "\n\n".join(parts)


def write_time_choice(all_results: Sequence[TaskResults]) -> str:
    """Return, for each task, what is best where a step is to be faster."""
    rows = []
    for results in all_results:
        for row in results.rows:
            if row.family != "speed" or row.is_tuned or not row.runs:
                continue
            time = time_share(results, row)
            rivals = {rival.match_by: rival for rival in find_rivals(results, row)}
            cells = [results.task, row.label, _number(time), _against(results, row, results.exact)]
            cells += [_against(results, row, rivals.get(by)) for by in ("time, batch", "time, steps")]
            rows.append([*cells, _advise_time(results, row, time, list(rivals.values()))])
    heads = "task|setting|time|− exact|− smaller batch of equal time|− fewer steps of equal time|use"
    return _table(heads.split("|"), rows)


def _advise_time(results: TaskResults, row: Row, time: float | None, rivals: Sequence[Row]) -> str:
    if time is not None and time > 1 - _SAME_TIME:
        return "nothing: no time is saved here"
    comparisons = [(rival, compare_rows(results, row, rival)) for rival in rivals]
    said = {rival.label: say_winner(results, found) for rival, found in comparisons if found is not None}
    lost = [label for label, winner in said.items() if winner == "the one beside it"]
    if lost:
        return f"{lost[0]}"
    if said and all(winner == "the method" for winner in said.values()):
        return row.label
    return "either: no difference found" if said else _UNKNOWN


def write_memory_choice(all_results: Sequence[TaskResults]) -> str:
    """Return, for each task, what holds fewer bytes and what it costs."""
    families = ("memory", "both", "checkpoints", "parts", "compiled")
    rows = []
    for results in all_results:
        for row in results.rows:
            is_batch = row.match_by == "bytes, batch"
            if row.is_tuned or not row.runs or not (is_batch or row.family in families):
                continue
            cells = [results.task, row.label, _number(bytes_share(results, row)), _number(time_share(results, row))]
            rows.append([*cells, _against(results, row, results.exact)])
    return _table(["task", "method", "bytes held", "time", "− exact"], rows)


def _against(results: TaskResults, row: Row, other: Row | None) -> str:
    return _UNKNOWN if other is None else _interval(results, compare_rows(results, row, other))


def _interval(results: TaskResults, comparison: Comparison | None) -> str:
    if comparison is None:
        return _UNKNOWN
    write: Callable[[float], str] = "{:+.3f}".format if results.is_text else "{:+.2f}".format
    if comparison.pairs < 2:
        return write(comparison.mean)
    return f"{write(comparison.mean)} [{write(comparison.low)}, {write(comparison.high)}]"


def _spread(results: TaskResults, row: Row) -> str:
    values = list(row.collect(metric_of(results)).values())
    if not values:
        return "diverged"
    mean, deviation = summarise(values)
    if results.is_text:
        return f"{mean:.3f} ± {deviation:.3f}"
    return f"{100 * mean:.2f} ± {100 * deviation:.2f}"


def _omega(row: Row) -> str:
    omegas = row.omegas
    return f"{summarise(omegas)[0]:.3g}" if omegas else _UNKNOWN


def _name(row: Row) -> str:
    return row.label + (", own rate" if row.is_tuned else "")


def _number(value: float | None, form: str = "{:.2f}") -> str:
    return _UNKNOWN if value is None or value != value else form.format(value)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
