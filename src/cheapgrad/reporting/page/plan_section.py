"""Plans: what each layer takes, and what the step costs then; bytes and noise by layer are among those of others."""

from __future__ import annotations

from collections.abc import Sequence

from cheapgrad.cost.units import format_flops
from cheapgrad.planning.record import Plan
from cheapgrad.planning.units import name_units
from cheapgrad.reporting.figures import UNKNOWN, format_bytes, format_plain, format_share
from cheapgrad.reporting.markup import Html, element
from cheapgrad.reporting.page.tables import Column, head_cell, make_table, number_cell, text_cell
from cheapgrad.reporting.record_files import RecordFile
from cheapgrad.sketch import AbstractStrategy


def write_plan_section(files: Sequence[RecordFile]) -> Html:
    """Return the section on plans, or nothing where there is none.

    Args:
        files: those that hold a plan.
    """
    if not files:
        return Html()
    parts = [_write_plan(file.record, file.label, f"plan-{number}") for number, file in enumerate(files)]
    return element("section", element("h2", "Plans"), *parts, id="plan")


def describe_plan(plan: Plan, label: str) -> str:
    """Return what a plan promises, and whether a smaller batch would do better."""
    planned, exact = plan.predicted, plan.exact
    # Where parts are known, the sentence on bytes by module says it.
    held = f"holds {format_bytes(planned.saved_bytes)} instead of {format_bytes(exact.saved_bytes)} and "
    return (
        f"{label}: the plan {'' if plan.held else held}is predicted to add {planned.noise_fraction:.3g} of the "
        f"{plan.noise_units}; {plan.advice}."
    )


def _write_plan(plan: Plan, label: str, name: str) -> Html:
    asked = ", ".join(f"{budget} = {value}" for budget, value in plan.budgets.items()) or "nothing"
    rows = [
        [
            head_cell(layer.name or "(model)"),
            text_cell(_write_strategy(layer.stored)),
            text_cell(_write_strategy(layer.cotangent)),
            number_cell(layer.noise_fraction, format_plain, modelled=True),
        ]
        for layer in plan.layers
    ]
    columns = (Column("layer"), Column("stored"), Column("cotangent"), Column("noise", "modelled"))
    return element(
        "div",
        element("h3", label),
        element("p", "; ".join([f"Asked for: {asked}", *plan.remarks])),
        _write_totals(plan, label, name),
        make_table(f"{name}-layers", f"{label}: layer by layer", columns, rows),
        class_="group",
    )


def _write_strategy(strategy: AbstractStrategy | None) -> str:
    return UNKNOWN if strategy is None else repr(strategy)


def _write_totals(plan: Plan, label: str, name: str) -> Html:
    exact, planned = plan.exact, plan.predicted
    rows = []
    for what, before, after, write in (
        ("held for backward", exact.saved_bytes, planned.saved_bytes, format_bytes),
        ("forward FLOPs", exact.forward_flops, planned.forward_flops, format_flops),
        ("backward FLOPs", exact.backward_flops, planned.backward_flops, format_flops),
    ):
        share = after / before if before else None
        rows.append(
            [head_cell(what, source="counted"), *(number_cell(value, write) for value in (before, after)),
             number_cell(share, format_share)]
        )  # fmt: skip
    noise = (exact.noise_fraction, planned.noise_fraction, None)
    rows.append(
        [
            head_cell(f"noise (ω){name_units(plan.in_optimizer_units)}", source="modelled"),
            *(number_cell(v, format_plain, modelled=True) for v in noise),
        ]
    )
    columns = (Column(""), Column("exact"), Column("planned"), Column("planned ÷ exact"))
    return make_table(f"{name}-totals", f"{label}: the whole step", columns, rows)
