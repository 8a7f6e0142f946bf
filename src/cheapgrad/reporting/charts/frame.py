"""What all charts share: the marks, the legend, the title for those who do not see it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cheapgrad.reporting.markup import Html, element, join

# Charts are drawn this wide and scaled to the page: text of 12 units is 10 pixels on the narrowest telephone.
WIDTH = 400
_COLOURS = 7
_LONGEST_LABEL = 56
_SHAPES = ("circle", "triangle", "square", "diamond", "nabla", "cross")


@dataclass(frozen=True)
class Series:
    """Numbers that belong together: one for each row of a chart.

    Attributes:
        label: name for people.
        values: one for each row; None where there is none.
        style: number of its colour and shape.
        modelled: whether they were computed from a law; else they were measured. Drawn hollow.
    """

    label: str
    values: tuple[float | None, ...]
    style: int = 0
    modelled: bool = False


def draw_frame(name: str, title: str, description: str, height: float, *content: object) -> Html:
    """Return the chart around its content.

    Args:
        name: unique on the page.
        title: read aloud in place of the picture, with the description.
        description: what is to be seen; the numbers stand in the table beside it.
        height: in units of the chart.
        content: elements of SVG.
    """
    return element(
        "svg",
        element("title", title, id=f"{name}-title"),
        element("desc", description, id=f"{name}-desc"),
        *content,
        viewBox=f"0 0 {WIDTH} {height:.0f}",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
        class_="chart",
    )


def draw_legend(series: Iterable[tuple[str, int, bool]], *others: Html) -> Html:
    """Return a list that says which mark means what.

    Args:
        series: label, style and whether it is modelled, of each.
        others: further entries.
    """
    entries = [
        element("li", _draw_key(draw_mark(8, 8, style, label, modelled=modelled)), " ", label)
        for label, style, modelled in series
    ]
    return element("ul", *entries, *others, class_="legend")


def _draw_key(mark: Html) -> Html:
    return element("svg", mark, viewBox="0 0 16 16", width=16, height=16, aria_hidden="true", class_="key")


def name_style(style: int, *, modelled: bool) -> str:
    """Return the classes of a series: style 0, that of what the others are compared with, has a colour of its own."""
    colour = 0 if style == 0 else 1 + (style - 1) % _COLOURS
    return f"s{colour}" + (" modelled" if modelled else "")


def draw_mark(x: float, y: float, style: int, label: str, *, modelled: bool = False, size: float = 4.5) -> Html:
    """Return a mark; the label is shown where the pointer rests on it."""
    classes = f"mark {name_style(style, modelled=modelled)}"
    shape = _SHAPES[style % len(_SHAPES)]
    inner = element("title", label)
    if shape == "circle":
        return element("circle", inner, cx=_number(x), cy=_number(y), r=_number(size), class_=classes)
    return element("path", inner, d=_outline(shape, x, y, size), class_=classes)


def _outline(shape: str, x: float, y: float, size: float) -> str:
    corners = {
        "triangle": ((-1, 0.8), (1, 0.8), (0, -1)),
        "square": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
        "diamond": ((0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)),
        "nabla": ((-1, -0.8), (1, -0.8), (0, 1)),
        "cross": tuple(
            (0.35 * a if turn else a, b)
            for turn, a, b in (
                (1, -1, -1), (1, 1, -1), (1, 1, -0.35), (0, 1, -0.35), (0, 1, 0.35), (1, 1, 0.35),
                (1, 1, 1), (1, -1, 1), (1, -1, 0.35), (0, -1, 0.35), (0, -1, -0.35), (1, -1, -0.35),
            )
        ),
    }[shape]  # fmt: skip
    points = " L".join(f"{_number(x + size * a)} {_number(y + size * b)}" for a, b in corners)
    return f"M{points} Z"


def draw_text(x: float, y: float, text: str, *, anchor: str = "start", class_: str | None = None) -> Html:
    """Return a line of text."""
    return element("text", text, x=_number(x), y=_number(y), text_anchor=anchor, class_=class_)


def draw_line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    """Return a straight line."""
    return element("line", x1=_number(x1), y1=_number(y1), x2=_number(x2), y2=_number(y2), class_=class_)


def draw_box(x: float, y: float, width: float, height: float, label: str | None, class_: str) -> Html:
    """Return a rectangle; the label is shown where the pointer rests on it."""
    return element(
        "rect",
        None if label is None else element("title", label),
        x=_number(x),
        y=_number(y),
        width=_number(max(width, 0.0)),
        height=_number(height),
        class_=class_,
    )


def shorten_label(label: str) -> str:
    """Return a label that fits over a row: what is in the middle of a long one is left out.

    >>> shorten_label("a" * 40 + "." + "b" * 40)
    'aaaaaaaaaaaaaaaaaaaaaaaaaaa…bbbbbbbbbbbbbbbbbbbbbbbbbbbb'
    """
    if len(label) <= _LONGEST_LABEL:
        return label
    half = _LONGEST_LABEL // 2
    return f"{label[: half - 1]}…{label[-half:]}"


def known(series: Sequence[Series]) -> list[float]:
    """Return all numbers of all series that are numbers."""
    return [value for one in series for value in one.values if value is not None and not math.isnan(value)]


def group(*content: object, class_: str) -> Html:
    """Return elements that share a class."""
    return element("g", join(*content), class_=class_)


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
