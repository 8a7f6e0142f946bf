"""The comparison as tables on the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cheapgrad.reporting.records import DemoRecord, MethodRecord, ModelRecord

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_METHOD_WIDTH = 25
_LEGEND = """\
[b]accuracy[/b] is that on the test pictures, after equally many steps.
[b]step time[/b] is the median on one thread, methods interleaved; [b]bytes held[/b] are those of the whole network.
[b]variance[/b] is E‖ĝ − g‖² / ‖g‖² of the gradient, half-way through training, by the layers' laws and as measured.
[b]ω[/b] = added variance ÷ that of the mini-batch. [b]c(1+ω)[/b], c the step time: below 1 it beats a smaller batch.
[b]bias z[/b]: the largest z-score of the bias over {draws} fixed draws; {bands} is what chance explains."""


def print_tables(record: DemoRecord, console: Console) -> None:
    """Print one table for each model, and below them what the columns mean.

    Args:
        record: what the demo found.
        console: a `rich.console.Console`.
    """
    for model in record.models:
        console.print(_make_table(model, len(record.seeds)))
        for method in model.methods:
            if method.remark:
                console.print(f"  {method.label}: {method.remark}", style="dim", highlight=False)
        console.print()
    if record.wide:
        exact, *others = record.wide
        steps = ", ".join(f"{step.label} {step.step_time_fraction:.2f}" for step in others)
        console.print(
            f"[b]Timed only[/b]: {exact.description}; exact {1000 * exact.step_seconds:.0f} ms", highlight=False
        )
        console.print(f"  step time ÷ exact: {steps}\n", highlight=False)
    drawn = [method for model in record.models for method in model.methods if not method.is_exact and method.draws]
    if drawn:
        bands = sorted({_format_z(method.band) for method in drawn})
        chance = bands[0] if len(bands) == 1 else f"up to {bands[0]} – {bands[-1]}"
        console.print(_LEGEND.format(draws=drawn[0].draws, bands=chance), highlight=False)


def _make_table(model: ModelRecord, seeds: int) -> Table:
    from rich import box
    from rich.table import Table

    title = (
        f"{model.name}: {model.description}, {model.parameters:,} parameters, "
        f"{model.training_steps} steps, {seeds} seed{'s' if seeds > 1 else ''}"
    )
    table = Table(title=title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("method", overflow="fold", min_width=_METHOD_WIDTH)
    for heading in (
        "batch",
        "accuracy %\nmean ± sd",
        "step time\n÷ exact",
        "bytes held\n÷ exact",
        "variance\npredicted",
        "variance\nmeasured",
        "ω",
        "c(1+ω)",
        "bias z",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for position, method in enumerate(model.methods):
        following = model.methods[position + 1 :]
        ends_family = bool(following) and following[0].family != method.family
        table.add_row(*_format_row(method), end_section=ends_family)
    return table


def _format_row(method: MethodRecord) -> list[str]:
    accuracy = f"{100 * method.accuracy_mean:.1f}"
    if not math.isnan(method.accuracy_deviation):
        accuracy += f" ± {100 * method.accuracy_deviation:.1f}"
    exact = method.kind == "exact"
    time = f"{1000 * method.step_seconds:.1f} ms" if exact else f"{method.step_time_fraction:.2f}"
    held = format_bytes(method.held_bytes) if exact else f"{method.held_bytes_fraction:.2f}"
    z = _format_z(method.max_abs_z)
    return [
        method.label,
        str(method.batch_size),
        accuracy,
        time,
        held,
        _format_variance(method.predicted_relative_variance),
        _format_variance(method.measured_relative_variance),
        _format_variance(method.noise_fraction),
        f"{method.cost_times_noise:.2f}",
        z if method.unbiased else f"[bold red]{z} BIASED[/]",
    ]


def _format_variance(value: float | None) -> str:
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _format_z(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def format_bytes(count: float) -> str:
    """Return a number of bytes for people.

    >>> format_bytes(1536)
    '1.5 KiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
