"""The comparison as a picture: accuracy against step time and against bytes held."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

from cheapgrad.errors import MissingExtraError
from cheapgrad.reporting.records import DemoRecord, ModelRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANELS = (
    ("step_time_fraction", "time of a training step ÷ exact"),
    ("held_bytes_fraction", "bytes held for backward ÷ exact"),
)
# Okabe and Ito's palette, which colour-blind readers can tell apart; black is the exact method's.
_COLOURS = ("#777777", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#B8A800")
# Accuracies are drawn to scale down to this far below the exact method's.
_SHOWN_PERCENT = 8.0
_MARKERS = ("o", "^", "s", "D", "v", "P")


def draw_scatter(record: DemoRecord) -> bytes:
    """Draw test accuracy against step time and against bytes held, one row of panels for each model.

    Args:
        record: what the demo found.

    Returns:
        The picture as PNG data. Colour tells the family of methods, shape the budget; bars are one standard deviation
        over the seeds.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "drawing the picture needs matplotlib, which is not installed; run: pip install 'cheapgrad[report]'"
        ) from error
    rows = len(record.models)
    figure = Figure(figsize=(12, 0.8 + 4.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, 2, squeeze=False, sharey="row")
    for model, row in zip(record.models, panels, strict=True):
        for panel, (attribute, label) in zip(row, _PANELS, strict=True):
            _fill_panel(panel, model, attribute)
            panel.set_xlabel(label)
        row[0].set_ylabel("test accuracy, %")
        row[0].set_title(f"{model.name}: {model.description}", loc="left", fontsize=11)
    # Models may have different methods; every label is listed once.
    legend = {
        label: handle for row in panels for handle, label in zip(*row[0].get_legend_handles_labels(), strict=True)
    }
    figure.legend(legend.values(), legend.keys(), loc="outside right upper", fontsize=9, frameon=False)
    seeds = len(record.seeds)
    figure.supxlabel(
        f"{record.data}. Up and to the left is better. Mean ± standard deviation over {seeds} seed{'s' * (seeds > 1)}.",
        fontsize=9,
        color="#555555",
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _fill_panel(panel: Axes, model: ModelRecord, attribute: str) -> None:
    families = list(dict.fromkeys(method.family for method in model.methods if method.kind != "exact"))
    exact_percent = 100 * model.exact.accuracy_mean
    panel.axvline(1, color="#cccccc", linewidth=1, zorder=0)
    panel.axhline(exact_percent, color="#cccccc", linewidth=1, zorder=0)
    lowest = exact_percent - _SHOWN_PERCENT
    budgets: dict[str, int] = {}
    for method in model.methods:
        budget = budgets.get(method.family, 0)
        budgets[method.family] = budget + 1
        percent, deviation = 100 * method.accuracy_mean, 100 * method.accuracy_deviation
        position = getattr(method, attribute)
        exact = method.kind == "exact"
        colour = "black" if exact else _COLOURS[families.index(method.family) % len(_COLOURS)]
        panel.errorbar(
            position,
            max(percent, lowest),
            yerr=None if math.isnan(deviation) or percent < lowest else deviation,
            color=colour,
            marker="*" if exact else _MARKERS[budget % len(_MARKERS)],
            markersize=13 if exact else 7,
            capsize=3,
            linestyle="none",
            elinewidth=1,
            label=f"batch of equal step time, budget {budget + 1}" if method.kind == "batch" else method.label,
        )
        if percent < lowest:
            panel.annotate(
                f"↓ {percent:.0f} %",
                (position, lowest),
                xytext=(7, 7 * budget - 3),
                textcoords="offset points",
                fontsize=8,
                color=colour,
            )
    panel.grid(alpha=0.25)
    panel.margins(x=0.12)
    # Far below, methods would press all others into one line; they stand on the floor with their figure beside them.
    panel.set_ylim(bottom=max(panel.get_ylim()[0], lowest - 0.06 * _SHOWN_PERCENT))
