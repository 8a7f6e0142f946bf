"""Bytes held for backward, by layer and by operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from cheapgrad.reporting.charts import Series, draw_bars
from cheapgrad.reporting.charts.frame import draw_legend
from cheapgrad.reporting.figures import format_bytes, format_share
from cheapgrad.reporting.markup import Html, element, join
from cheapgrad.reporting.page.tables import Column, head_cell, make_table, number_cell, pair
from cheapgrad.reporting.page.views import HeldColumn, HeldGroup

_MOST_ROWS = 16


def write_held_section(groups: Sequence[HeldGroup]) -> Html:
    """Return the section on bytes, or nothing where no record has them."""
    if not groups:
        return Html()
    parts = [_write_group(group, f"held-{number}") for number, group in enumerate(groups)]
    return element("section", element("h2", "Bytes held for backward"), *parts, id="held")


def _write_group(group: HeldGroup, name: str) -> Html:
    drawn = _choose_columns(group.columns)
    said = ""
    if len(group.columns) > len(drawn):
        said = f"Drawn: {drawn[0].label}, and {drawn[1].label}, which holds least. All others are in the table. "
    parts = [_write_part(group, drawn, f"{name}-modules", "module", lambda column: column.modules)]
    if any(column.operations for column in group.columns):
        parts.append(_write_part(group, drawn, f"{name}-operations", "operation", lambda column: column.operations))
    return element("div", element("h3", group.title), element("p", said, group.note), *parts, class_="group")


def _choose_columns(columns: Sequence[HeldColumn]) -> tuple[HeldColumn, ...]:
    """Return the first column and, of the others, the one that holds least: bars for all would be a forest."""
    first, *others = columns
    return (first, min(others, key=lambda column: column.total_bytes)) if others else (first,)


def _write_part(
    group: HeldGroup,
    drawn: Sequence[HeldColumn],
    name: str,
    what: str,
    read: Callable[[HeldColumn], Mapping[str, float]],
) -> Html:
    largest: dict[str, float] = {}
    for column in group.columns:
        for row, amount in read(column).items():
            largest[row] = max(largest.get(row, 0), amount)
    rows = sorted((row for row, amount in largest.items() if amount), key=lambda row: -largest[row])
    shown = rows[:_MOST_ROWS]
    series = [Series(column.label, tuple(read(column).get(row, 0) for row in shown), column.style) for column in drawn]
    title = f"{group.title}: bytes held by {what}"
    more = f"; {len(rows) - len(shown)} smaller ones are in the table only" if len(rows) > len(shown) else ""
    chart = draw_bars(name, title, f"bars, those that hold most first{more}", shown, series, format_bytes)
    legend = draw_legend((one.label, one.style, one.modelled) for one in series)
    note = element("p", f"The {len(shown)} largest of {len(rows)}.", class_="note") if more else None
    return pair(chart, _make_table(group, name, what, rows, read), element("h4", f"By {what}"), legend, note)


def _make_table(
    group: HeldGroup, name: str, what: str, rows: Sequence[str], read: Callable[[HeldColumn], Mapping[str, float]]
) -> Html:
    columns = [Column(what)]
    columns += [Column(column.label, "measured") for column in group.columns]
    exact = group.columns[0].total_bytes
    cells = [
        [head_cell("all"), *(number_cell(column.total_bytes, format_bytes) for column in group.columns)],
        [
            head_cell(f"all ÷ {group.columns[0].label}"),
            *(number_cell(column.total_bytes / exact if exact else None, format_share) for column in group.columns),
        ],
    ]
    cells += [
        [head_cell(row), *(number_cell(read(column).get(row, 0), format_bytes) for column in group.columns)]
        for row in rows
    ]
    return make_table(name, join(f"{group.title}: bytes held by {what}"), columns, cells)
