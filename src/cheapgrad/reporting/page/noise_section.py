"""Variance against that of the mini-batch, and bias against what chance explains, by parameter or layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from cheapgrad.reporting.charts import Series, draw_dots
from cheapgrad.reporting.charts.dots import Guide
from cheapgrad.reporting.charts.frame import draw_legend
from cheapgrad.reporting.figures import Format, format_percent, format_plain, format_z
from cheapgrad.reporting.markup import Html, element
from cheapgrad.reporting.page.tables import Column, head_cell, make_table, number_cell, pair
from cheapgrad.reporting.page.views import Noise, NoiseColumn, NoiseGroup

_MOST_ROWS = 24
# The row before all parameters.
_WHOLE, _LARGEST = "whole gradient", "largest of all"


def write_variance_section(groups: Sequence[NoiseGroup]) -> Html:
    """Return the section on variance, or nothing where no record has any."""
    if not groups:
        return Html()
    parts = [_write_variance(group, f"variance-{number}") for number, group in enumerate(groups)]
    text = (
        "ω is the variance that a sketch adds, divided by the variance that the gradient of the mini-batch has anyway. "
        "At the line, ω = 1, both are equal: the sketch costs as much precision as half the batch."
    )
    return element(
        "section", element("h2", "Variance against the mini-batch"), element("p", text), *parts, id="variance"
    )


def write_bias_section(groups: Sequence[NoiseGroup]) -> Html:
    """Return the section on bias, or nothing where no gradient was tested."""
    audited = [
        dataclasses.replace(group, columns=columns)
        for group in groups
        if (columns := tuple(column for column in group.columns if column.is_audited()))
    ]
    if not audited:
        return Html()
    parts = [_write_bias(group, f"bias-{number}") for number, group in enumerate(audited)]
    text = (
        "For each parameter the largest z-score of the mean error over all draws, tested along the gradient and along "
        "random sums of its entries. Within the shaded band chance explains it, all tests together; beyond it the "
        "gradient is wrong on average."
    )
    return element("section", element("h2", "Bias"), element("p", text), *parts, id="bias")


def _write_variance(group: NoiseGroup, name: str) -> Html:
    if all(column.total.noise_fraction is None for column in group.columns):
        return _write_relative_variance(group, name)

    def read(noise: Noise) -> float | None:
        return noise.noise_fraction

    guide = Guide("ω: added variance ÷ that of the mini-batch", lines=(1.0,))
    table = _make_table(group, name, "added variance ÷ that of the mini-batch (ω)", read, format_plain)
    return _write_group(group, name, "variance", read, guide, table, logarithmic=True)


def _write_relative_variance(group: NoiseGroup, name: str) -> Html:
    """Show what is left where nobody measured the variance of the mini-batch."""

    def read(noise: Noise) -> float | None:
        return noise.relative_variance

    guide = Guide("added variance ÷ squared norm; that of the mini-batch is not recorded")
    table = _make_table(group, name, "added variance ÷ squared norm of the gradient", read, format_plain)
    return _write_group(group, name, "variance", read, guide, table, logarithmic=True)


def _write_bias(group: NoiseGroup, name: str) -> Html:
    def read(noise: Noise) -> float | None:
        return noise.max_abs_z

    bands = tuple(sorted({column.band for column in group.columns if column.band is not None}))
    # More than two lines would say less.
    guide = Guide(
        "largest |z|; shaded: what chance explains", bands=(bands[0], bands[-1])[: len(bands)] if bands else ()
    )
    table = _make_table(group, name, "largest z-score of the bias", read, format_z, tests=True)
    return _write_group(group, name, "largest z-score", read, guide, table, logarithmic=False, first=_LARGEST)


def _write_group(
    group: NoiseGroup,
    name: str,
    what: str,
    read: Callable[[Noise], float | None],
    guide: Guide,
    table: Html,
    *,
    logarithmic: bool,
    first: str = _WHOLE,
) -> Html:
    rows = [first, *_largest(group, read)]
    series = [
        Series(
            column.label,
            tuple(
                read(column.total if position == 0 else column.layers.get(row, Noise()))
                for position, row in enumerate(rows)
            ),
            column.style,
            column.modelled,
        )
        for column in group.columns
    ]
    title = f"{group.title}: {what} by {group.row}"
    names = len(group.names)
    left_out = names - len(rows) + 1
    more = f"The {len(rows) - 1} largest of {names} {group.row}s; the others are in the table." if left_out else ""
    write = format_plain if logarithmic else format_z
    chart = draw_dots(
        name, title, f"dots; {guide.label}. {more}", rows, series, guide, logarithmic=logarithmic, write=write
    )
    legend = draw_legend((one.label, one.style, one.modelled) for one in series)
    note = element("p", more, class_="note") if more else None
    return element(
        "div",
        element("h3", group.title),
        element("p", group.note) if group.note else None,
        pair(chart, table, legend, note),
        class_="group",
    )


def _largest(group: NoiseGroup, read: Callable[[Noise], float | None]) -> list[str]:
    """Return the layers to draw, in the model's order: all of them, or those with the largest figures."""
    names = group.names

    def size(name: str) -> float:
        figures = [read(column.layers[name]) for column in group.columns if name in column.layers]
        return max((figure for figure in figures if figure is not None and figure == figure), default=-1.0)

    chosen = set(sorted(names, key=lambda name: -size(name))[:_MOST_ROWS])
    return [name for name in names if name in chosen]


def _make_table(
    group: NoiseGroup,
    name: str,
    caption: str,
    read: Callable[[Noise], float | None],
    write: Format,
    *,
    tests: bool = False,
) -> Html:
    columns = [Column(group.row)]
    columns += [Column(column.label, "modelled" if column.modelled else "measured") for column in group.columns]
    first = _LARGEST if tests else _WHOLE
    rows = [[head_cell(first), *(_write_cell(column, column.total, read, write, tests) for column in group.columns)]]
    if tests:
        rows += _write_test_rows(group.columns)
    rows += [
        [head_cell(row), *(_write_cell(c, c.layers.get(row, Noise()), read, write, tests) for c in group.columns)]
        for row in group.names
    ]
    return make_table(name, f"{group.title}: {caption}", columns, rows)


def _write_test_rows(columns: Sequence[NoiseColumn]) -> list[list[Html]]:
    """Return what the z-scores are to be judged by: the band, the draws, and what would have been seen."""
    return [
        [
            head_cell("band: chance explains up to", source="computed"),
            *(number_cell(column.band, format_z) for column in columns),
        ],
        [head_cell("draws"), *(number_cell(column.draws, "{:.0f}".format) for column in columns)],
        [
            head_cell("error of scale that would have been seen", source="computed"),
            *(number_cell(column.total.detectable_relative_bias, format_percent) for column in columns),
        ],
    ]


def _write_cell(
    column: NoiseColumn, noise: Noise, read: Callable[[Noise], float | None], write: Format, tests: bool
) -> Html:
    value = read(noise)
    alarm = tests and value is not None and column.band is not None and not value <= column.band
    return number_cell(value, write, modelled=column.modelled, alarm=alarm)
