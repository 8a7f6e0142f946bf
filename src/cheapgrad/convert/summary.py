"""The table that ``print(handle)`` shows."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Sequence

from cheapgrad.convert.layer_record import LayerRecord
from cheapgrad.cost.units import format_bytes, format_flops
from cheapgrad.sketch.fusing import why_unfused

_HEADS: tuple[str, ...] = ("layer", "kind", "status", "saved", "backward", "rel. var. dW")
# Columns of text, broken over lines where they are wider than this: nothing is cut out of them.
_WIDEST = {"layer": 60, "kind": 32, "status": 60}
# What they are given at least before a column is left out.
_NARROWEST = {"layer": 10, "kind": 8, "status": 20}
# The columns that a narrow terminal does without, first the one needed least; the variance is never among them.
_LEFT_OUT_FIRST = ("kind", "backward", "saved")
_GAP = 2


def render_summary(rows: Sequence[LayerRecord], *, reverted: bool = False, width: int | None = None) -> str:
    """Return a table of the rows with a line of totals, as plain text.

    Args:
        rows: what happened to each layer.
        reverted: whether the conversion was undone.
        width: in columns of text; by default that of the terminal, or what everything needs if there is none.
    """
    cells = {head: [head] for head in _HEADS}
    for row in rows:
        for head, text in zip(_HEADS, _write_cells(row), strict=True):
            cells[head].append(text)
    width = _terminal_width() if width is None else width
    heads, widths = _lay_out({head: max(map(len, texts)) for head, texts in cells.items()}, width)
    notes = _footnotes(rows)
    left_out = [head for head in _HEADS if head not in heads]
    if left_out:
        notes.insert(0, f"not shown in {width} columns of text: {', '.join(left_out)}; handle.rows has all of it")
    return "\n".join([*_headline(rows, reverted), _draw_table(cells, heads, widths), *notes])


def _terminal_width() -> int | None:
    """Return the width of the terminal that prints; None where output goes elsewhere and nobody says how wide."""
    from rich.console import Console

    told = os.environ.get("COLUMNS", "").isdigit()
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return Console(file=sys.stdout).width if told or is_terminal else None


def _lay_out(needed: dict[str, int], width: int | None) -> tuple[list[str], dict[str, int]]:
    """Return the columns to show and the width of each; numbers are never broken."""
    widths = {head: min(count, _WIDEST.get(head, count)) for head, count in needed.items()}
    heads: list[str] = list(_HEADS)
    if width is None:
        return heads, widths
    narrowest = {head: min(count, _NARROWEST.get(head, count)) for head, count in widths.items()}
    for head in _LEFT_OUT_FIRST:
        if _total(heads, narrowest) > width:
            heads.remove(head)
    # The text that is left shrinks, what explains before what names.
    for head in ("status", "kind", "layer"):
        excess = _total(heads, widths) - width
        if head in heads and excess > 0:
            widths[head] = max(widths[head] - excess, narrowest[head])
    return heads, widths


def _total(heads: Sequence[str], widths: dict[str, int]) -> int:
    return sum(widths[head] for head in heads) + _GAP * (len(heads) - 1)


def _draw_table(cells: dict[str, list[str]], heads: Sequence[str], widths: dict[str, int]) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="", padding=(0, _GAP, 0, 0), collapse_padding=True)
    for head in heads:
        is_last = head == heads[-1]
        table.add_column(head, justify="right" if is_last else "left", overflow="fold", width=widths[head])
    for texts in zip(*(cells[head][1:] for head in heads), strict=True):
        table.add_row(*texts)
    buffer = io.StringIO()
    # The widths are settled: rich must not shrink them again where even the narrowest table is too wide.
    width = _total(heads, widths) + _GAP
    Console(file=buffer, width=width, color_system=None, highlight=False, markup=False).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().splitlines())


def _write_cells(row: LayerRecord) -> tuple[str, ...]:
    return (
        row.name or "(model)",
        row.kind,
        _status(row),
        _change(row.exact_saved_bytes, row.saved_bytes, format_bytes),
        _change(row.exact_backward_flops, row.backward_flops, format_flops),
        "-" if row.relative_variance is None else f"{row.relative_variance:.3g}",
    )


def _change(before: float | None, after: float | None, formatter: object) -> str:
    if before is None or after is None or not callable(formatter):
        return "-"
    return f"{formatter(before)} → {formatter(after)}"


def _status(row: LayerRecord) -> str:
    strategies = [f"{name}={value}" for name, value in (("stored", row.stored), ("cotangent", row.cotangent)) if value]
    return "; ".join([row.status, *strategies, *([row.remark] if row.remark else [])])


def _headline(rows: Sequence[LayerRecord], reverted: bool) -> list[str]:
    converted = [row for row in rows if row.status == "converted"]
    lines = [
        f"cheapgrad: {len(converted)} of {len(rows)} matched layers converted" + (" (reverted)" if reverted else "")
    ]
    seen = [row for row in converted if row.saved_bytes is not None]
    if seen:
        saved = [sum(getattr(row, key) or 0 for row in seen) for key in ("exact_saved_bytes", "saved_bytes")]
        flops = [sum(getattr(row, key) or 0 for row in seen) for key in ("exact_backward_flops", "backward_flops")]
        whose = "these layers" if len(seen) == len(converted) else f"{len(seen)} of these layers"
        lines.append(
            f"inputs kept by {whose} {_change(saved[0], saved[1], format_bytes)}, "
            f"their backward products {_change(flops[0], flops[1], format_flops)} (modelled)"
        )
    return lines


def _footnotes(rows: Sequence[LayerRecord]) -> list[str]:
    """Return what has to be said about the cells, and nothing that does not apply to them."""
    converted = [row for row in rows if row.status == "converted"]
    seen = [row for row in converted if row.saved_bytes is not None]
    notes = []
    if converted and not seen:
        notes.append("bytes and FLOPs appear after the first training batch")
    elif len(seen) < len(converted):
        names = _enumerate(row for row in converted if row.saved_bytes is None)
        notes.append(f"no bytes and FLOPs of {names}: no batch came by, or there is no model of it")
    # Layers without a product have no variance to wait for.
    with_products = [row for row in converted if row.exact_backward_flops != 0]
    unknown = [row for row in with_products if row.weight_variance is None and not row.unpredicted]
    is_predicted = any(row.weight_variance is not None or row.input_variance is not None for row in converted)
    if unknown and not is_predicted:
        notes.append("relative variances appear after handle.predict(closure)")
    elif unknown:
        notes.append(
            f"no relative variance of {_enumerate(unknown)}: the weight is frozen, the closure did not come by, or "
            "there is no model of it"
        )
    for reason in dict.fromkeys(row.unpredicted for row in converted if row.unpredicted):
        names = _enumerate(row for row in converted if row.unpredicted == reason)
        notes.append(f"no variance of {names} can be predicted: {reason}")
    notes += _fusing_notes(converted)
    if seen:
        notes.append(
            "bytes and FLOPs are modelled layer by layer, as if every layer needed dX and dW; a neighbour (a ReLU, a "
            "norm) may keep the same input, and then more is held than before: handle.measure_cost(batch), two runs of "
            "cheapgrad.scan, counts what really runs and what the network holds"
        )
    return notes


def _fusing_notes(converted: Sequence[LayerRecord]) -> list[str]:
    """Return how codecs run, where there are any."""
    codecs = [row.stored for row in converted if row.stored is not None and row.stored.startswith("StochasticRounding")]
    fused = [codec for codec in codecs if "fused=True" in codec]
    notes = []
    if len(fused) < len(codecs):
        notes.append(
            f"codecs of {len(codecs) - len(fused)} layers run unfused, one operation after the other: fused=True "
            "(recipes.memory(bits=4, fused=True)) compiles them, in seconds at the first step, for faster ones"
        )
    if fused and why_unfused():
        notes.append(f"codecs of {len(fused)} layers are to be fused; in this process run unfused: {why_unfused()}")
    return notes


def _enumerate(rows: Iterable[LayerRecord]) -> str:
    """Return the names of the first few rows, and how many there are beside them."""
    names = [row.name or "(model)" for row in rows]
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
