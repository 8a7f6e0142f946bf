"""The comparison as a picture: accuracy against step time and against bytes held."""

from __future__ import annotations

import io
import math

from cheapgrad.errors import MissingExtraError
from cheapgrad.reporting.records import DemoRecord, ModelRecord

_PANELS = (
    ("step_time_fraction", "time of a training step ÷ exact"),
    ("held_bytes_fraction", "bytes held for backward ÷ exact"),
)
# Okabe and Ito's palette, which colour-blind readers can tell apart; black is the exact method's.
_COLOURS = ("#777777", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#B8A800")
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
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=9, frameon=False)
    seeds = len(record.seeds)
    figure.supxlabel(
        f"{record.data}. Up and to the left is better. Mean ± standard deviation over {seeds} seed{'s' * (seeds > 1)}.",
        fontsize=9,
        color="#555555",
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _fill_panel(panel, model: ModelRecord, attribute: str) -> None:
    families = list(dict.fromkeys(method.family for method in model.methods if method.kind != "exact"))
    panel.axvline(1, color="#cccccc", linewidth=1, zorder=0)
    panel.axhline(100 * model.exact.accuracy_mean, color="#cccccc", linewidth=1, zorder=0)
    seen: dict[str, int] = {}
    for method in model.methods:
        budget = seen.get(method.family, 0)
        seen[method.family] = budget + 1
        exact = method.kind == "exact"
        deviation = method.accuracy_deviation
        panel.errorbar(
            getattr(method, attribute),
            100 * method.accuracy_mean,
            yerr=None if math.isnan(deviation) else 100 * deviation,
            color="black" if exact else _COLOURS[families.index(method.family) % len(_COLOURS)],
            marker="*" if exact else _MARKERS[budget % len(_MARKERS)],
            markersize=13 if exact else 7,
            capsize=3,
            linestyle="none",
            elinewidth=1,
            label=method.label,
        )
    panel.grid(alpha=0.25)
    panel.margins(x=0.08)
