"""The table that ``print(plan)`` shows."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from cheapgrad.planning.units import name_units

if TYPE_CHECKING:
    from cheapgrad.planning.record import Plan

_WIDTH = 130


def render_plan(plan: Plan) -> str:
    """Return a plan as plain text: a line for each layer, then the totals, the advice and the remarks.

    Args:
        plan: the plan.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="")
    for header in ("layer", "stored", "cotangent", "rows drawn at", "noise", "passed down"):
        table.add_column(header, justify="right" if header in ("noise", "passed down") else "left", overflow="fold")
    for layer in plan.layers:
        shares_rows = layer.drawn_at not in (None, layer.name)
        figures = ("", "") if shares_rows else (f"{layer.noise_fraction:.3g}", f"{layer.passed_down_share:.0%}")
        table.add_row(
            layer.name or "(model)",
            "-" if layer.stored is None else repr(layer.stored),
            "-" if layer.cotangent is None else repr(layer.cotangent),
            layer.drawn_at or "-",
            *figures,
        )
    buffer = io.StringIO()
    Console(file=buffer, width=_WIDTH, color_system=None, highlight=False, markup=False).print(table)
    budgets = ", ".join(f"{name}={value!r}" for name, value in plan.budgets.items())
    units = f", noise{name_units(plan.in_optimizer_units)}" * plan.in_optimizer_units
    lines = [f"cheapgrad plan for {budgets}{units}: {len(plan.layers)} layers"]
    if plan.layers:
        lines += ["", "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().splitlines()), ""]
    lines += [*plan.describe_totals(), plan.advice, *plan.remarks]
    return "\n".join(lines)
