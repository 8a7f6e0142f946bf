"""Charts: where things lie."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest

from cheapgrad.reporting.charts import Point, Series, draw_bars, draw_dots, draw_scatter_chart
from cheapgrad.reporting.charts.axis import Axis, make_linear_axis, make_logarithmic_axis
from cheapgrad.reporting.charts.dots import Guide
from cheapgrad.reporting.charts.frame import WIDTH, draw_legend
from cheapgrad.reporting.figures import format_plain
from cheapgrad.reporting.markup import Html, element, escape


def centres(chart: str) -> list[tuple[float, float]]:
    """Return the centres of the circles."""
    return [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in ElementTree.fromstring(chart).iter("circle")]


def texts(chart: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(chart).iter("text")]


def test_axes_place_numbers_in_proportion():
    linear = Axis(0, 10, 100, 200)
    assert [linear.place(value) for value in (0, 2.5, 10)] == [100, 125, 200]
    assert [linear.place(value) for value in (-5, 99, math.inf, -math.inf, math.nan)] == [100, 200, 200, 100, 100]
    logarithmic = Axis(0.01, 100, 0, 400, logarithmic=True)
    assert [logarithmic.place(value) for value in (0.01, 0.1, 1, 10, 100, 0, -1)] == pytest.approx(
        [0, 100, 200, 300, 400, 0, 0]
    )


@pytest.mark.parametrize(
    "values", [[0.3, 7.7], [5.0], [0.0], [1e-9, 2e-9], [-3.0, 1e6], [], [math.nan, math.inf], [1e308, -1e308]]
)
def test_linear_axes_hold_what_is_finite_and_have_few_round_ticks(values):
    for from_zero in (True, False):
        axis = make_linear_axis(values, 0, 100, from_zero=from_zero)
        assert axis.low < axis.high
        assert all(axis.holds(value) for value in values if abs(value) < 1e300)
        ticks = axis.ticks()
        assert 2 <= len(ticks) <= 7
        assert ticks == sorted(set(ticks))
        assert all(axis.low <= tick <= axis.high or math.isclose(tick, axis.high) for tick in ticks)


@pytest.mark.parametrize("values", [[0.03, 7.0], [1.0], [], [0.0, -1.0], [1e-250, 1e250], [5e-324], [math.inf, 2.0]])
def test_logarithmic_axes_have_powers_of_ten_for_ticks(values):
    axis = make_logarithmic_axis(values, 0, 100)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 7
    assert all(math.isclose(math.log10(tick), round(math.log10(tick)), abs_tol=1e-9) for tick in ticks)
    assert all(axis.holds(value) for value in values if 1e-300 < value < math.inf)


def test_bars_are_as_long_as_their_numbers():
    series = (Series("exact", (100.0, 50.0)), Series("planned", (25.0, None), style=1, modelled=True))
    chart = draw_bars("c", "title", "description", ["a", "b"], series, format_plain)
    bars = list(ElementTree.fromstring(chart).iter("rect"))
    widths = [float(bar.get("width", "")) for bar in bars]
    assert widths[1:] == pytest.approx([widths[0] / 4, widths[0] / 2, 0])
    assert ["modelled" in bar.get("class", "") for bar in bars] == [False, True, False, True]
    assert texts(chart) == ["a", "100", "25.0", "b", "50.0", "–"]


def test_bars_without_rows_or_finite_numbers():
    assert "<rect" not in draw_bars("c", "t", "d", [], [], format_plain)
    chart = draw_bars("c", "t", "d", ["a"], [Series("exact", (math.inf,))], format_plain)
    assert texts(chart) == ["a", "∞"]


def test_dots_lie_on_their_axis_and_those_beyond_it_have_arrows():
    guide = Guide("z", bands=(8.0,))
    chart = draw_dots(
        "c", "t", "d", list("abcd"), [Series("one", (0.0, 8.0, math.inf, None))], guide, logarithmic=False
    )
    (x0, y0), (x8, y8), (x_inf, _) = centres(chart)
    band = next(box for box in ElementTree.fromstring(chart).iter("rect") if box.get("class") == "band")
    assert x0 == float(band.get("x", ""))
    assert x8 == pytest.approx(x0 + float(band.get("width", "")), abs=0.11)
    assert x8 < x_inf <= WIDTH
    assert y8 - y0 == 30
    assert texts(chart).count("▸") == 1


def test_dots_on_a_logarithmic_axis():
    guide = Guide("ω", lines=(1.0,))
    chart = draw_dots("c", "t", "d", list("abc"), [Series("one", (0.01, 1.0, 0.0))], guide, logarithmic=True)
    (low, _), (one, _), (zero, _) = centres(chart)
    line = next(line for line in ElementTree.fromstring(chart).iter("line") if line.get("class") == "guide")
    assert float(line.get("x1", "")) == one
    assert low == zero
    assert texts(chart).count("◂") == 1


def test_points_join_the_frontier_and_fall_to_the_floor():
    points = [
        Point("exact", 1.0, 98.0, 1.0, 0, on_frontier=True),
        Point("fast", 0.5, 97.0, math.nan, 6, on_frontier=True),
        Point("bad", 0.6, 10.0, None, 12),
        Point("nowhere", math.nan, 50.0, None, 0),
    ]
    chart = draw_scatter_chart("c", "t", "d", points, "time", "accuracy", 90.0)
    (x_exact, y_exact), (x_fast, y_fast), (_, y_bad) = centres(chart)
    assert x_fast < x_exact
    assert y_exact < y_fast < y_bad
    (line,) = [line for line in ElementTree.fromstring(chart).iter("line") if line.get("class") == "frontier"]
    ends = [float(line.get(name, "")) for name in ("x1", "y1", "x2", "y2")]
    assert ends == [x_fast, y_fast, x_exact, y_exact]
    assert "↓ 10" in texts(chart)
    bars = [line for line in ElementTree.fromstring(chart).iter("line") if "deviation" in line.get("class", "")]
    assert len(bars) == 1


def test_legend_draws_modelled_marks_hollow():
    legend = draw_legend([("law", 1, True), ("measured", 2, False)])
    assert legend.count("modelled") == 1
    assert "law" in legend


def test_only_html_is_not_escaped():
    assert element("p", "<b>", Html("<i></i>"), None, 3) == "<p>&lt;b&gt;<i></i>3</p>"
    assert element("a", href='"><script>', data_x=None) == '<a href="&quot;&gt;&lt;script&gt;"></a>'
    assert escape("\x00\ud800\ufffe\n") == "���\n"
