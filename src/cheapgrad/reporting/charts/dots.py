"""Dots: a row for each layer, a dot for each series, on one axis with a band or a line to compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cheapgrad.reporting.charts.axis import Axis, make_linear_axis, make_logarithmic_axis
from cheapgrad.reporting.charts.frame import (
    WIDTH,
    Series,
    draw_box,
    draw_frame,
    draw_line,
    draw_mark,
    draw_text,
    known,
    shorten_label,
)
from cheapgrad.reporting.figures import Format, format_figure, format_plain
from cheapgrad.reporting.markup import Html

_LABEL, _STRIP, _MARGIN, _FOOT = 15, 15, 20, 34


@dataclass(frozen=True)
class Guide:
    """What the dots are compared with.

    Attributes:
        label: what it is, written at the axis.
        bands: from zero to here is shaded; several where they differ, the first darkest.
        lines: numbers at which a line stands.
    """

    label: str
    bands: tuple[float, ...] = ()
    lines: tuple[float, ...] = ()


def draw_dots(
    name: str,
    title: str,
    description: str,
    rows: Sequence[str],
    series: Sequence[Series],
    guide: Guide,
    *,
    logarithmic: bool,
    write: Format = format_plain,
) -> Html:
    """Draw a strip for each row and on it a dot for each series.

    Args:
        name: of the chart, unique on the page.
        title: of the chart.
        description: what is to be seen.
        rows: their names.
        series: one number for each row; infinite ones stand at the end of the axis, on a logarithmic axis what is
            not positive at its beginning, with an arrow; unknown and undefined ones are not drawn.
        guide: what to compare with.
        logarithmic: whether the axis is.
        write: how a number is written.
    """
    values = [*known(series), *guide.bands, *guide.lines]
    place = (_MARGIN, WIDTH - _MARGIN)
    axis = make_logarithmic_axis(values, *place) if logarithmic else make_linear_axis(values, *place, from_zero=True)
    height = len(rows) * (_LABEL + _STRIP)
    content = [*_draw_guide(guide, axis, height), *_draw_ticks(axis, height, guide.label)]
    for position, row in enumerate(rows):
        top = position * (_LABEL + _STRIP)
        content.append(draw_text(0, top + _LABEL - 4, shorten_label(row), class_="row"))
        middle = top + _LABEL + _STRIP / 2 - 1
        content.append(draw_line(axis.start, middle, axis.end, middle, "strip"))
        content.extend(
            dot for one in series if (dot := _draw_dot(row, one, one.values[position], middle, axis, write)) is not None
        )
    return draw_frame(name, title, description, height + _FOOT, *content)


def _draw_dot(row: str, series: Series, value: float | None, y: float, axis: Axis, write: Format) -> Html | None:
    if value is None or math.isnan(value):
        return None
    x = axis.place(value)
    label = f"{row}, {series.label}: {format_figure(value, write)}"
    if not axis.holds(value):
        arrow = draw_text(x, y + 4, "▸" if value > axis.high else "◂", anchor="middle", class_="arrow")
        return Html(draw_mark(x, y, series.style, label, modelled=series.modelled) + arrow)
    return draw_mark(x, y, series.style, label, modelled=series.modelled)


def _draw_guide(guide: Guide, axis: Axis, height: float) -> list[Html]:
    bands = [
        draw_box(axis.start, 0, axis.place(band) - axis.start, height, None, "band")
        for band in guide.bands
        if math.isfinite(band)
    ]
    numbers = [number for number in (*guide.bands, *guide.lines) if math.isfinite(number)]
    return bands + [draw_line(axis.place(number), 0, axis.place(number), height, "guide") for number in numbers]


def _draw_ticks(axis: Axis, height: float, label: str) -> list[Html]:
    content = [draw_text(WIDTH / 2, height + 30, label, anchor="middle", class_="axis")]
    for tick in axis.ticks():
        x = axis.place(tick)
        text = f"{tick:g}" if not axis.logarithmic else _write_power(tick)
        content.append(draw_line(x, height, x, height + 4, "tick"))
        content.append(draw_text(x, height + 15, text, anchor="middle", class_="tick"))
    return content


def _write_power(value: float) -> str:
    return f"{value:g}" if 1e-3 <= value <= 1e4 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e+")
