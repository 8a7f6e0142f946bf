"""Tables, the numbers of which can be read back: each cell carries its number in full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cheapgrad.reporting.figures import Format, format_figure
from cheapgrad.reporting.markup import Html, element, join


@dataclass(frozen=True)
class Column:
    """Head of a column.

    Attributes:
        heading: what it shows.
        source: ``"measured"``, ``"modelled"`` or ``"computed"`` (from measured figures), or empty for words.
    """

    heading: str
    source: str = ""


def number_cell(value: float | None, write: Format, *, modelled: bool = False, alarm: bool = False) -> Html:
    """Return a cell with a number; the number in full stands in the attribute ``data-value``.

    Args:
        value: the number, or None where it is unknown.
        write: how it is written.
        modelled: whether a law says so; else it was measured.
        alarm: whether it is a reason for alarm.
    """
    classes = " ".join(
        name
        for name, wanted in (("number", True), ("modelled", modelled and value is not None), ("alarm", alarm))
        if wanted
    )
    return element("td", format_figure(value, write), class_=classes, data_value=None if value is None else repr(value))


def text_cell(*content: object, class_: str | None = None) -> Html:
    """Return a cell with words."""
    return element("td", *content, class_=class_)


def head_cell(name: str, remark: str = "", source: str = "") -> Html:
    """Return the first cell of a row, which names it.

    Args:
        name: of the row; long ones break after dots.
        remark: what else the reader has to know.
        source: of the numbers in this row, where it is another than that of the columns.
    """
    parts = name.split(".")
    pieces = [piece for part in parts[:-1] for piece in (f"{part}.", element("wbr"))]
    return element(
        "th",
        *pieces,
        parts[-1],
        element("small", remark) if remark else None,
        element("small", source, class_=f"source {source}") if source else None,
        scope="row",
    )


def make_table(name: str, caption: str, columns: Sequence[Column], rows: Sequence[Sequence[Html]]) -> Html:
    """Return a table that scrolls by itself where the page is too narrow for it.

    Args:
        name: unique on the page.
        caption: what it shows.
        columns: heads of the columns.
        rows: cells, the first of each made by `head_cell`.
    """
    heads = [
        element(
            "th",
            column.heading,
            element("small", column.source, class_=f"source {column.source}") if column.source else None,
            scope="col",
        )
        for column in columns
    ]
    body = [element("tr", *row) for row in rows]
    table = element(
        "table",
        element("caption", caption, id=f"{name}-caption"),
        element("thead", element("tr", *heads)),
        element("tbody", *body),
    )
    # Whoever uses the keyboard has to reach what scrolls.
    return element("div", table, class_="scroll", role="region", tabindex=0, aria_labelledby=f"{name}-caption")


def pair(chart: Html, table: Html, *legend: object) -> Html:
    """Return a chart with its table beside it, below each other where there is no room."""
    return element("figure", element("div", join(*legend), chart, class_="drawing"), table)
