"""What an audit prints."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING

from cheapgrad.cost.units import format_bytes, format_flops

if TYPE_CHECKING:
    from cheapgrad.auditing.report import AuditReport, LayerAudit

_WIDTH = 160
_NAMED = 4
# Scales this near to a whole number, or to one over it, are named as such.
_WHOLE = 0.02
# A gradient in this direction is the exact one but for its length.
_SAME_DIRECTION = 0.999

_LEGEND = (
    "bias z: largest z-score of the mean error; beyond ±{band:.1f} is bias (alpha {alpha:g}, {tests} tests).",
    "scale: length along the exact gradient; seen from: error of scale that would have been found, 99 times in 100.",
    "variance: E‖ĝ − Eĝ‖² / ‖g‖²; ω: the same ÷ variance of the mini-batch's gradient; held, backward: ÷ exact.",
)


def render_audit(report: AuditReport, top: int | None) -> str:
    """Return the report as plain text: a table, what its columns mean, remarks, and the verdict."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = list(report.layers)
    if top is not None and len(shown) > top:
        kept = {layer.name for layer in sorted(shown, key=lambda layer: -layer.max_abs_z)[:top]}
        shown = [layer for layer in shown if layer.name in kept]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="")
    table.add_column("parameter", overflow="fold", min_width=12)
    for header in ("entries", "bias z", "scale", "seen from", "variance", "ω", "cosine", "held", "backward"):
        table.add_column(header, justify="right", no_wrap=True)
    for layer in shown:
        name = layer.name if layer.max_abs_z <= report.band else f"BIASED {layer.name}"
        table.add_row(name, f"{layer.coordinates:,}", *_cells(layer))
    table.add_section()
    table.add_row("all", f"{sum(layer.coordinates for layer in report.layers):,}", *_cells(report))
    buffer = io.StringIO()
    Console(file=buffer, width=_WIDTH, color_system=None, highlight=False, markup=False).print(table)
    lines = [line.rstrip() for line in textwrap.dedent(buffer.getvalue()).strip("\n").splitlines()]
    if len(shown) < len(report.layers):
        lines.append(f"{len(report.layers) - len(shown)} more parameters: report.table(top=None) shows all")
    lines += [line.format(band=report.band, alpha=report.alpha, tests=report.tests) for line in _LEGEND]
    lines += [f"reference: {report.reference}", *report.remarks, report.verdict()]
    return "\n".join(lines)


def _cells(row: LayerAudit | AuditReport) -> list[str]:
    return [
        f"{row.max_abs_z:.1f}",
        f"{row.scale:.4g}",
        _percent(row.detectable_relative_bias),
        f"{row.relative_variance:.3g}",
        "-" if row.noise_fraction is None else f"{row.noise_fraction:.3g}",
        f"{row.cosine:.4f}",
        _against(row.held_bytes, row.exact_held_bytes, format_bytes),
        _against(row.backward_flops, row.exact_backward_flops, format_flops),
    ]


def _against(value: int | None, exact: int | None, form: Callable[[float | None], str]) -> str:
    if value is None or exact is None:
        return ""
    return f"{form(value)} ({value / exact:.2f})" if exact else form(value)


def _percent(fraction: float) -> str:
    if not math.isfinite(fraction):
        return "-"
    return f"{100 * fraction:.2g} %" if fraction < 0.995 else f"{100 * fraction:.0f} %"


def write_verdict(report: AuditReport) -> str:
    """Return what was found in one sentence or two."""
    count = len(report.layers)
    if report.unbiased:
        text = (
            f"UNBIASED as far as {report.draws} draws show: largest z {report.max_abs_z:.1f}, band {report.band:.1f}, "
            f"{count} parameters; an error of scale of {_percent(report.detectable_relative_bias)} would have been "
            "seen in the whole gradient"
        )
        visible = [layer for layer in report.layers if layer.squared_norm > 0]
        hidden = [layer.name for layer in visible if layer.detectable_relative_bias >= 1]
        blindest = max((layer.detectable_relative_bias for layer in visible if layer.name not in hidden), default=None)
        if blindest is not None:
            text += f", of {_percent(blindest)} in every parameter"
        if hidden:
            text += (
                f"; but not one as large as the gradient itself in {len(hidden)} whose gradient is small beside its "
                f"noise or rounding, such as {hidden[0]}"
            )
        return f"{text}. {_on_noise(report)}"
    biased = report.biased_layers
    named = ", ".join(f"{layer.name} ({_describe(layer)})" for layer in biased[:_NAMED])
    more = f" and {len(biased) - _NAMED} more" if len(biased) > _NAMED else ""
    where = f" in {len(biased)} of {count} parameters: {named}{more}" if biased else " in the gradient as a whole"
    return f"BIASED{where}; band {report.band:.1f}. {_on_length(report)}".rstrip()


def _describe(layer: LayerAudit) -> str:
    if layer.deterministic_error > 0:
        return f"off by {_percent(layer.deterministic_error)} even without sketches, scale {layer.scale:.4g}"
    return f"z {layer.max_abs_z:.1f}, scale {layer.scale:.4g}, bias {_percent(layer.relative_bias)}"


def _on_noise(report: AuditReport) -> str:
    text = f"Added variance: {report.relative_variance:.3g} of ‖g‖²"
    if report.noise_fraction is None:
        return text + "."
    text += f", {report.noise_fraction:.3g} of the mini-batch's"
    if report.preconditioned_noise_fraction is None:
        return text + "."
    return f"{text} ({report.preconditioned_noise_fraction:.3g} in units of the optimizer's steps)."


def _on_length(report: AuditReport) -> str:
    """Say it where the gradient is right but for its length, as after a wrong normalisation."""
    if not report.cosine > _SAME_DIRECTION or report.scale <= 0 or abs(report.scale - 1) < _WHOLE:
        return ""
    times = report.scale if report.scale > 1 else 1 / report.scale
    if abs(times / round(times) - 1) < _WHOLE and round(times) > 1:
        if report.scale > 1:
            return f"The gradient has the right direction and {round(times)} times its length: not divided?"
        return f"The gradient has the right direction and 1/{round(times)} of its length: divided twice?"
    return f"The gradient has the right direction and {report.scale:.3g} times its length."
