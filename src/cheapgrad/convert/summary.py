"""The table that ``print(handle)`` shows."""

from __future__ import annotations

import io
from collections.abc import Sequence

from cheapgrad.convert.layer_record import LayerRecord
from cheapgrad.cost.units import format_bytes, format_flops

# Columns that may be broken over lines, with their least width: nothing is cut out of them.
_FOLDED = {"kind": 8, "status": 44}


def _change(before: float | None, after: float | None, formatter: object) -> str:
    if before is None or after is None or not callable(formatter):
        return "-"
    return f"{formatter(before)} → {formatter(after)}"


def render_summary(rows: Sequence[LayerRecord], *, reverted: bool = False) -> str:
    """Return a table of the rows with a line of totals, as plain text."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="")
    for header in ("layer", "kind", "status", "saved", "backward", "rel. var. dW"):
        table.add_column(
            header,
            justify="right" if header == "rel. var. dW" else "left",
            no_wrap=header not in _FOLDED,
            overflow="fold" if header in _FOLDED else "ellipsis",
            min_width=_FOLDED.get(header),
            max_width=24 if header == "kind" else None,
        )
    for row in rows:
        table.add_row(
            row.name or "(model)",
            row.kind,
            _status(row),
            _change(row.exact_saved_bytes, row.saved_bytes, format_bytes),
            _change(row.exact_backward_flops, row.backward_flops, format_flops),
            "-" if row.relative_variance is None else f"{row.relative_variance:.3g}",
        )
    buffer = io.StringIO()
    console = Console(file=buffer, width=150, color_system=None, highlight=False, markup=False)
    console.print(table)
    return "\n".join([*_headline(rows, reverted), buffer.getvalue().rstrip(), *_footnotes(rows)])


def _status(row: LayerRecord) -> str:
    strategies = [f"{name}={value}" for name, value in (("stored", row.stored), ("cotangent", row.cotangent)) if value]
    return "; ".join([row.status, *strategies, *([row.remark] if row.remark else [])])


def _headline(rows: Sequence[LayerRecord], reverted: bool) -> list[str]:
    converted = [row for row in rows if row.status == "converted"]
    lines = [
        f"cheapgrad: {len(converted)} of {len(rows)} matched layers converted" + (" (reverted)" if reverted else "")
    ]
    if converted and all(row.saved_bytes is not None for row in converted):
        saved = [sum(getattr(row, key) or 0 for row in converted) for key in ("exact_saved_bytes", "saved_bytes")]
        flops = [sum(getattr(row, key) or 0 for row in converted) for key in ("exact_backward_flops", "backward_flops")]
        lines.append(
            f"inputs kept by these layers {_change(saved[0], saved[1], format_bytes)}, "
            f"their backward products {_change(flops[0], flops[1], format_flops)} (modelled)"
        )
    return lines


def _footnotes(rows: Sequence[LayerRecord]) -> list[str]:
    notes = []
    if any(row.status == "converted" and row.saved_bytes is None for row in rows):
        notes.append("bytes and FLOPs appear after the first training batch")
    if any(row.status == "converted" and row.weight_variance is None and row.exact_backward_flops != 0 for row in rows):
        notes.append("relative variances appear after handle.predict(closure)")
    notes.append(
        "bytes and FLOPs are modelled layer by layer, as if every layer needed dX and dW; a neighbour (a ReLU, a norm) "
        "may keep the same input, and then more is held than before: handle.measure_cost(batch), two runs of "
        "cheapgrad.scan, counts what really runs and what the network holds"
    )
    return notes
