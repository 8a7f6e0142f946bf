"""Points: what is bought, against what is paid for it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from cheapgrad.reporting.charts.axis import Axis, make_linear_axis
from cheapgrad.reporting.charts.frame import WIDTH, draw_frame, draw_line, draw_mark, draw_text, name_style
from cheapgrad.reporting.markup import Html

_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 300, 56, 12, 10, 40
# Half the width of a number at the floor.
_FALLEN = 15


@dataclass(frozen=True)
class Point:
    """One way of training.

    Attributes:
        label: name for people.
        x: what is paid.
        y: what is bought.
        deviation: of `y`; None or nan where it is unknown.
        style: number of its colour and shape.
        on_frontier: whether no other point has more for as little.
    """

    label: str
    x: float
    y: float
    deviation: float | None
    style: int
    on_frontier: bool = False


def draw_scatter_chart(
    name: str,
    title: str,
    description: str,
    points: Sequence[Point],
    x_label: str,
    y_label: str,
    lowest: float,
) -> Html:
    """Draw points, their deviations, and the line through those that no other beats.

    Args:
        name: of the chart, unique on the page.
        title: of the chart.
        description: what is to be seen.
        points: what to draw; those without finite place are left out.
        x_label: what is paid.
        y_label: what is bought.
        lowest: points below are drawn here, with an arrow, so that they do not press all others into one line.
    """
    points = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
    x_axis = make_linear_axis([point.x for point in points], _LEFT, WIDTH - _RIGHT, from_zero=False)
    heights = [max(point.y, lowest) for point in points]
    heights += [point.y + (point.deviation or 0.0) for point in points if not math.isnan(point.deviation or 0.0)]
    y_axis = make_linear_axis(heights, _HEIGHT - _BOTTOM, _TOP, from_zero=False)
    content = _draw_axes(x_axis, y_axis, x_label, y_label)
    best = sorted((point for point in points if point.on_frontier and point.y >= lowest), key=lambda point: point.x)
    for left, right in itertools.pairwise(best):
        ends = (x_axis.place(left.x), y_axis.place(left.y), x_axis.place(right.x), y_axis.place(right.y))
        content.append(draw_line(*ends, "frontier"))
    for point in points:
        content.extend(_draw_point(point, x_axis, y_axis, lowest))
    content.extend(_name_fallen([point for point in points if point.y < lowest], x_axis, y_axis.place(lowest)))
    return draw_frame(name, title, description, _HEIGHT, *content)


def _draw_point(point: Point, x_axis: Axis, y_axis: Axis, lowest: float) -> list[Html]:
    x, y = x_axis.place(point.x), y_axis.place(max(point.y, lowest))
    label = f"{point.label}: {point.x:.2f}, {point.y:.1f}"
    bar = []
    if point.y >= lowest and point.deviation and math.isfinite(point.deviation):
        low, high = y_axis.place(point.y - point.deviation), y_axis.place(point.y + point.deviation)
        bar = [draw_line(x, low, x, high, f"deviation {name_style(point.style, modelled=False)}")]
    return [*bar, draw_mark(x, y, point.style, label, size=5)]


def _name_fallen(points: Sequence[Point], x_axis: Axis, floor: float) -> list[Html]:
    """Write the numbers of what lies too low to be drawn to scale, one above the other where they are close."""
    texts, last, level = [], -math.inf, 0
    for point in sorted(points, key=lambda point: point.x):
        x = x_axis.place(point.x)
        level = level + 1 if x - last < 2 * _FALLEN else 0
        last = x
        texts.append(draw_text(x, floor - 9 - 12 * level, f"↓ {point.y:.0f}", anchor="middle", class_="number"))
    return texts


def _draw_axes(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> list[Html]:
    bottom = _HEIGHT - _BOTTOM
    content = [draw_line(_LEFT, bottom, WIDTH - _RIGHT, bottom, "tick"), draw_line(_LEFT, _TOP, _LEFT, bottom, "tick")]
    for tick in x_axis.ticks():
        x = x_axis.place(tick)
        content += [
            draw_line(x, _TOP, x, bottom, "strip"),
            draw_text(x, bottom + 15, f"{tick:g}", anchor="middle", class_="tick"),
        ]
    for tick in y_axis.ticks():
        y = y_axis.place(tick)
        content += [
            draw_line(_LEFT, y, WIDTH - _RIGHT, y, "strip"),
            draw_text(_LEFT - 5, y + 4, f"{tick:g}", anchor="end", class_="tick"),
        ]
    middle = (bottom + _TOP) / 2
    turned = Html(
        draw_text(14, middle, y_label, anchor="middle", class_="axis").replace(
            "<text ", f'<text transform="rotate(-90 14 {middle:g})" ', 1
        )
    )
    return [*content, draw_text((WIDTH + _LEFT) / 2, _HEIGHT - 6, x_label, anchor="middle", class_="axis"), turned]
