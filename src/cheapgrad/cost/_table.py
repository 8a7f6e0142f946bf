"""The tables that reports print."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from cheapgrad.cost.report import CostReport, Figures
from cheapgrad.cost.units import format_bytes, format_flops
from cheapgrad.errors import check_count

if TYPE_CHECKING:
    from rich.table import Table

    from cheapgrad.cost.comparison import CostComparison

T = TypeVar("T")

_WIDTH = 140


def render_report(report: CostReport, top: int | None) -> str:
    """Return the modules that cost anything as plain text, those that hold most first."""
    rows = [row for row in report.rows if row.flops or row.saved_bytes]
    rows.sort(key=lambda row: (-row.saved_bytes, -row.flops))
    shown = _first(rows, top)
    table = new_table("module", "kind", "calls", "parameters", "held", "forward", "backward", "recomputed", "÷ forward")
    for row in shown:
        table.add_row(row.name or "(model)", row.kind, str(row.calls), *_cells(row))
    table.add_section()
    table.add_row("all", "", "", *_cells(report.total))
    notes = (
        [f"{len(rows) - len(shown)} more modules: report.table(top=None) shows all"] if len(shown) < len(rows) else []
    )
    unknown, small = report.uncounted[: report.unknown], report.uncounted[report.unknown :]
    if unknown:
        notes.append(f"NOT counted, of unknown cost: {', '.join(unknown)}; see cheapgrad.cost.register_formula")
    if small:
        notes.append(f"not counted, a few steps for each element: {', '.join(_bare(name) for name in small)}")
    headline = "one step, without data" if report.fake else "one step"
    return "\n".join([f"{headline}: own figures of each module", to_text(table), *notes, *report.remarks])


def _first(lines: list[T], top: int | None) -> list[T]:
    """Return the first lines; all if `top` is None or 0, as on the command line."""
    return lines if top is None or check_count("top", top, minimum=0) == 0 else lines[:top]


def new_table(*headers: str) -> Table:
    """Return an empty table whose first two columns are text and the others numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="")
    for position, header in enumerate(headers):
        is_text = position < 2
        table.add_column(header, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    return table


def to_text(table: Table) -> str:
    """Return a table as plain text."""
    from rich.console import Console

    buffer = io.StringIO()
    Console(file=buffer, width=_WIDTH, color_system=None, highlight=False, markup=False).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().strip("\n").splitlines())


def _cells(figures: Figures) -> list[str]:
    ratio = figures.backward_per_forward
    counts = (figures.forward_flops, figures.backward_flops, figures.recompute_flops)
    return [
        f"{figures.parameters:,}",
        format_bytes(figures.saved_bytes) if figures.saved_bytes else "",
        *[format_flops(count) if count else "" for count in counts],
        "" if ratio is None else f"{ratio:.2f}",
    ]


def _bare(name: str) -> str:
    return name.removeprefix("aten::")


def render_comparison(comparison: CostComparison, top: int | None) -> str:
    """Return two reports as plain text, the modules that save most bytes first."""
    nothing = Figures()
    pairs = [(row.name, row.before or nothing, row.after or nothing) for row in comparison.rows]
    pairs.sort(key=lambda pair: (pair[2].saved_bytes - pair[1].saved_bytes, pair[2].flops - pair[1].flops))
    shown = _first(pairs, top)
    table = new_table("module", "", "held", "forward", "backward", "recomputed")
    for name, before, after in shown:
        table.add_row(name or "(model)", "", *_changes(before, after))
    table.add_section()
    table.add_row("all", "", *_changes(comparison.before, comparison.after))
    notes = [f"{len(pairs) - len(shown)} more modules: table(top=None) shows all"] if len(shown) < len(pairs) else []
    return "\n".join(["before → after: own figures of each module", to_text(table), *notes, *comparison.remarks])


def _changes(before: Figures, after: Figures) -> list[str]:
    def change(name: str, formatter: Callable[[float], str]) -> str:
        one, other = getattr(before, name), getattr(after, name)
        return formatter(one) if one == other else f"{formatter(one)} → {formatter(other)}"

    return [
        change("saved_bytes", format_bytes),
        change("forward_flops", format_flops),
        change("backward_flops", format_flops),
        change("recompute_flops", format_flops) if before.recompute_flops or after.recompute_flops else "",
    ]
