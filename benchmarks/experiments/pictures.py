"""Pictures of the documentation: accuracy against time and bytes, added noise against budget, steps against theory."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.experiments.analysis import bytes_share, measure_reach, metric_of, time_share
from benchmarks.experiments.predictions import list_predictions
from benchmarks.experiments.results import Row, TaskResults
from benchmarks.experiments.statistics import summarise

_TICKS = (0.6, 0.8, 1, 1.25, 1.6, 2, 2.5, 3, 4, 6)
_FARTHEST = 6.0

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_task(results: TaskResults) -> bytes:
    """Return a PNG with four panels; every point is a mean over seeds, every bar one standard deviation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    colours = _choose_colours(results)
    _draw_frontier(panels[0][0], results, colours, "time")
    _draw_frontier(panels[0][1], results, colours, "bytes")
    _draw_noise(panels[1][0], results, colours)
    _draw_theory(panels[1][1], results, colours)
    labels: dict[str, Any] = {name: handle for row in panels for panel in row for handle, name in _legend_of(panel)}
    figure.legend(labels.values(), labels.keys(), loc="outside right upper", fontsize=8, frameon=False)
    figure.suptitle(f"{results.task}: {results.network}", fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, metadata={"Software": None})
    return buffer.getvalue()


def _choose_colours(results: TaskResults) -> dict[str, Any]:
    from matplotlib import colormaps

    families = list(dict.fromkeys(row.family for row in results.rows if row.runs and row is not results.exact))
    return {"exact": "black", **{name: colormaps["tab20"](number % 20) for number, name in enumerate(families)}}


def _legend_of(panel: Axes) -> list[tuple[Any, str]]:
    return list(zip(*panel.get_legend_handles_labels(), strict=True))


def _shown(results: TaskResults) -> list[Row]:
    return [row for row in results.rows if row.runs and not row.is_tuned]


def _draw_frontier(panel: Axes, results: TaskResults, colours: dict[str, Any], against: str) -> None:
    scale = 1.0 if results.is_text else 100.0
    for row in _shown(results):
        share = time_share(results, row) if against == "time" else bytes_share(results, row)
        values = [scale * value for value in row.collect(metric_of(results)).values()]
        if share is None or not values:
            continue
        mean, deviation = summarise(values)
        marker = "*" if row is results.exact else "x" if row.is_biased else "s" if row.match_label else "o"
        panel.errorbar(
            share,
            mean,
            yerr=None if deviation != deviation else deviation,
            color=colours[row.family],
            marker=marker,
            markersize=12 if marker == "*" else 6,
            capsize=2,
            linestyle="none",
            label=row.family,
        )
    panel.axvline(1, color="#cccccc", linewidth=1, zorder=0)
    panel.set_xlabel(f"{against if against == 'time' else 'bytes held'} ÷ exact")
    panel.set_ylabel("test loss" if results.is_text else "test accuracy, %")
    panel.set_title("squares: exact methods of equal cost; crosses: biased", fontsize=9, loc="left")
    panel.grid(alpha=0.25)


def _draw_noise(panel: Axes, results: TaskResults, colours: dict[str, Any]) -> None:
    families: dict[str, list[tuple[float, float]]] = {}
    for row in _shown(results):
        if row.budget is not None and row.omegas and not row.is_biased:
            families.setdefault(row.family, []).append((row.budget, summarise(row.omegas)[0]))
    for family, points in families.items():
        panel.plot(*zip(*sorted(points), strict=True), marker="o", color=colours[family], label=family)
    if families:
        panel.set_yscale("log")
    panel.set_xlabel("share that is kept")
    panel.set_ylabel("ω, added variance ÷ that of the mini-batch")
    panel.grid(alpha=0.25)


def _draw_theory(panel: Axes, results: TaskResults, colours: dict[str, Any]) -> None:
    for row in _shown(results):
        reach = measure_reach(results, row)
        if reach.steps_ratio is None or reach.predicted is None or reach.noise_dominated is None or row.is_biased:
            continue
        span = [[0.0], [reach.noise_dominated - reach.predicted]]
        panel.errorbar(
            reach.predicted, reach.steps_ratio, xerr=span, color=colours[row.family], marker="o", label=row.family
        )
    low, high = panel.get_xlim()
    panel.plot([max(low, 0.5), high], [max(low, 0.5), high], color="#999999", linewidth=1, zorder=0)
    panel.set_xlabel("steps to the target ÷ exact, predicted (bar: to 1 + ω)")
    panel.set_ylabel("measured")
    panel.grid(alpha=0.25)


def draw_theory(all_results: Sequence[TaskResults]) -> bytes:
    """Return a PNG of predicted and measured ratios of steps, all unbiased methods of all tasks together."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    highest = 1.5
    for number, results in enumerate(all_results):
        label: str | None = results.task
        for row in _shown(results) if results.exact.runs else []:
            reach = measure_reach(results, row)
            if reach.steps_ratio is None or reach.predicted is None or row.is_biased:
                continue
            highest = max(highest, reach.steps_ratio, reach.predicted)
            colour = colormaps["tab10"](number % 10)
            panel.plot(reach.predicted, reach.steps_ratio, "o", color=colour, label=label)
            label = None
    panel.plot([0.5, highest], [0.5, highest], color="#999999", linewidth=1, zorder=0)
    _set_logarithmic(panel)
    panel.set_xlabel("steps to the target ÷ exact, predicted")
    panel.set_ylabel("measured")
    panel.grid(alpha=0.25, which="both")
    if _legend_of(panel):
        panel.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, metadata={"Software": None})
    return buffer.getvalue()


def _set_logarithmic(panel: Axes) -> None:
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    panel.set_xscale("log")
    panel.set_yscale("log")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_ticks(_TICKS)
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_formatter(NullFormatter())


def draw_predictions(all_results: Sequence[TaskResults]) -> bytes:
    """Return a PNG of measured ratios of whole trainings against those predicted in three ways."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    names = ("bound, every entry alike", "bound, in units of AdamW's steps", "smaller batches of that noise")
    for number, results in enumerate(all_results):
        colour = colormaps["tab10"](number % 10)
        found = list_predictions(results)
        for each in found:
            measured = each.measured
            middle, low, high = (
                min(value, measured.longest) for value in (measured.ratio, measured.low, measured.high)
            )
            is_open = measured.high > measured.longest
            marker = "s" if each.row.match_label else "o"
            ways = (each.predicted, each.predicted_adamw, each.predicted_batches)
            for panel, predicted in zip(panels, ways, strict=True):
                if predicted is None:
                    continue
                # Predictions far beyond the ruler stand at the edge.
                place = min(predicted, _FARTHEST)
                panel.errorbar(
                    place, middle, yerr=[[middle - low], [high - middle]], color=colour, marker=marker, capsize=2
                )
                if is_open:
                    # The ruler ends here, and what is measured with it does not.
                    panel.plot(place, high, "^", color=colour, markersize=9, fillstyle="none")
        if found:
            panels[0].plot([], [], "o", color=colour, label=results.task)
    for panel, name in zip(panels, names, strict=True):
        panel.plot([0.9, _FARTHEST], [0.9, _FARTHEST], color="#999999", linewidth=1, zorder=0)
        _set_logarithmic(panel)
        panel.set_ylim(0.6, 3.2)
        panel.set_title(f"{name}; squares: smaller batches; triangles: or more", fontsize=9, loc="left")
        panel.set_xlabel(f"steps ÷ exact, predicted (at the edge: {_FARTHEST:g} or more)")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("steps ÷ those of the exact training that ends as well")
    panels[0].legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, metadata={"Software": None})
    return buffer.getvalue()
