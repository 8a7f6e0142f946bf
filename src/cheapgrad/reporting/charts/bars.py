"""Bars: a row for each layer, a bar for each series."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cheapgrad.reporting.charts.axis import Axis
from cheapgrad.reporting.charts.frame import (
    WIDTH,
    Series,
    draw_box,
    draw_frame,
    draw_text,
    known,
    name_style,
    shorten_label,
)
from cheapgrad.reporting.figures import Format, format_figure
from cheapgrad.reporting.markup import Html

_LABEL, _BAR, _GAP = 15, 12, 8
# Room for the number at the end of the longest bar.
_NUMBER_WIDTH = 76


def draw_bars(
    name: str, title: str, description: str, rows: Sequence[str], series: Sequence[Series], write: Format
) -> Html:
    """Draw bars that begin at zero, each with its number at the end.

    Args:
        name: of the chart, unique on the page.
        title: of the chart.
        description: what is to be seen.
        rows: their names.
        series: one number for each row; what is unknown or no finite number has no bar but is written.
        write: how a number is written.
    """
    finite = [abs(value) for value in known(series) if math.isfinite(value)]
    axis = Axis(0.0, max(finite, default=0.0) or 1.0, 0.0, WIDTH - _NUMBER_WIDTH)
    content, y = [], 0.0
    for position, row in enumerate(rows):
        content.append(draw_text(0, y + _LABEL - 4, shorten_label(row), class_="row"))
        y += _LABEL
        for one in series:
            content.extend(_draw_bar(row, one, one.values[position], y, axis, write))
            y += _BAR + 1
        y += _GAP
    return draw_frame(name, title, description, max(y, 1), *content)


def _draw_bar(row: str, series: Series, value: float | None, y: float, axis: Axis, write: Format) -> list[Html]:
    text = format_figure(value, write)
    end = axis.place(abs(value)) if value is not None and math.isfinite(value) else 0.0
    classes = f"bar {name_style(series.style, modelled=series.modelled)}"
    box = draw_box(0, y, end, _BAR, f"{row}, {series.label}: {text}", classes)
    return [box, draw_text(end + 4, y + _BAR - 2, text, class_="number")]
