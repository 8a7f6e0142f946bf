"""What accuracy costs in time and in bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from cheapgrad.reporting.charts import Point, draw_scatter_chart
from cheapgrad.reporting.charts.frame import draw_legend
from cheapgrad.reporting.figures import (
    UNKNOWN,
    format_bytes,
    format_percent,
    format_plain,
    format_seconds,
    format_share,
    format_z,
)
from cheapgrad.reporting.markup import Html, element
from cheapgrad.reporting.page.tables import Column, head_cell, make_table, number_cell, text_cell
from cheapgrad.reporting.page.views import FrontierGroup
from cheapgrad.reporting.records import MethodRecord

# Accuracies are drawn to scale down to this far below the exact method's.
_SHOWN_PERCENT = 8.0

_COLUMNS = (
    Column("method"),
    Column("batch"),
    Column("accuracy", "measured"),
    Column("± deviation", "measured"),
    Column("step", "measured"),
    Column("step ÷ exact (c)", "measured"),
    Column("bytes held", "measured"),
    Column("bytes ÷ exact", "measured"),
    Column("variance", "modelled"),
    Column("variance", "measured"),
    Column("ω", "measured"),
    Column("c(1 + ω)", "computed"),
    Column("largest |z|", "measured"),
    Column("band", "computed"),
    Column("bias"),
)


def write_frontier_section(groups: Sequence[FrontierGroup]) -> Html:
    """Return the section on time, bytes and accuracy, or nothing where no record has them."""
    if not groups:
        return Html()
    parts = [_write_group(group, f"frontier-{number}") for number, group in enumerate(groups)]
    text = (
        "Up and to the left is better; the line joins what no other method beats. A smaller batch sits on "
        "c(1 + ω) = 1: a sketch that lies below needs less time than a smaller batch where noise dominates."
    )
    return element("section", element("h2", "Time, bytes and accuracy"), element("p", text), *parts, id="frontier")


def _write_group(group: FrontierGroup, name: str) -> Html:
    charts = element(
        "div",
        _draw(group, f"{name}-time", "time of a step ÷ exact", lambda method: method.step_time_fraction),
        _draw(group, f"{name}-bytes", "bytes held for backward ÷ exact", lambda method: method.held_bytes_fraction),
        class_="charts",
    )
    legend = draw_legend((method.label, style, False) for style, method in enumerate(group.methods))
    rows = [_write_row(method) for method in group.methods]
    table = make_table(name, f"{group.title}: every method", _COLUMNS, rows)
    figure = element("figure", legend, charts, table, class_="wide")
    return element("div", element("h3", group.title), element("p", group.note), figure, class_="group")


def _draw(group: FrontierGroup, name: str, label: str, read: Callable[[MethodRecord], float]) -> Html:
    places = [(read(method), 100 * method.accuracy_mean) for method in group.methods]
    points = [
        Point(
            label=method.label,
            x=x,
            y=y,
            deviation=100 * method.accuracy_deviation,
            style=style,
            on_frontier=not any(_beats(other, (x, y)) for other in places),
        )
        for style, (method, (x, y)) in enumerate(zip(group.methods, places, strict=True))
    ]
    exact = places[0][1]
    lowest = exact - _SHOWN_PERCENT if math.isfinite(exact) else -math.inf
    title = f"{group.title}: test accuracy against {label}"
    description = "points with their standard deviation; the table has the numbers"
    return draw_scatter_chart(name, title, description, points, label, "test accuracy, %", lowest)


def _beats(other: tuple[float, float], one: tuple[float, float]) -> bool:
    """Return whether the other point has at least as much for at most as little, and is not the same."""
    return other != one and other[0] <= one[0] and other[1] >= one[1]


def _write_row(method: MethodRecord) -> list[Html]:
    deviation = method.accuracy_deviation
    audited = not method.is_exact and method.draws > 0
    verdict = ("none found" if method.unbiased else "FOUND") if audited else UNKNOWN
    biased = audited and not method.unbiased
    return [
        head_cell(method.label, method.remark),
        number_cell(method.batch_size, "{:.0f}".format),
        number_cell(method.accuracy_mean if method.accuracies else None, format_percent),
        number_cell(None if math.isnan(deviation) else deviation, format_percent),
        number_cell(method.step_seconds, format_seconds),
        number_cell(method.step_time_fraction, format_share),
        number_cell(method.held_bytes, format_bytes),
        number_cell(method.held_bytes_fraction, format_share),
        number_cell(method.predicted_relative_variance, format_plain, modelled=True),
        number_cell(method.measured_relative_variance, format_plain),
        # For another batch size, the law of sampling says it.
        number_cell(method.noise_fraction, format_plain, modelled=method.kind == "batch"),
        number_cell(method.cost_times_noise, format_share, modelled=method.kind == "batch"),
        number_cell(method.max_abs_z, format_z, alarm=biased),
        number_cell(method.band, format_z),
        text_cell(verdict, class_="alarm" if biased else None),
    ]
