"""Build-time pages: the table of laws is written from the laws themselves."""

from __future__ import annotations

from typing import Any

import torch

from cheapgrad import sketch
from cheapgrad.ops.activation import Activation
from cheapgrad.ops.row_laws import norm_law, slope_law
from cheapgrad.sketch.law import Law

_MARKER = "<!-- laws -->"
_OPERATIONS_MARKER = "<!-- laws of operations -->"
_CODEC = sketch.StochasticRounding(bits=4)
_OPERATIONS: dict[str, Law] = {
    "activations whose slope takes every value of an interval": slope_law(Activation("gelu"), _CODEC),
    "activations of two slopes": slope_law(Activation("relu"), _CODEC),
    "`LayerNorm`, `RMSNorm`": norm_law(_CODEC, 1e-5, torch.ones(8), centred=True),
}
_SHOWN = (
    sketch.RowSample(keep=0.5),
    sketch.ExampleSample(keep=0.5),
    sketch.ColumnSample(keep=0.5),
    sketch.FeatureSample(keep=0.5),
    sketch.ElementMask(keep=0.5),
    sketch.RowProjection(keep=0.5),
    sketch.LowRank(rank=8),
    sketch.StochasticRounding(bits=4),
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the table of laws where a page asks for it."""
    for marker, table in ((_MARKER, laws_table), (_OPERATIONS_MARKER, operations_table)):
        if marker in markdown:
            markdown = markdown.replace(marker, table())
    return markdown


def laws_table() -> str:
    """Return the laws of all strategies as a Markdown table."""
    lines = ["| strategy | placed in | estimates | bias | variance | does not hold |", "|---|---|---|---|---|---|"]
    for strategy in _SHOWN:
        places = ", ".join(f"`{moment.value}=`" for moment in strategy.law.moments)
        lines.append(_line(f"`{strategy!r}`", places, strategy.law))
    return "\n".join(lines)


def operations_table() -> str:
    """Return the laws of operations that keep codes of their own as a Markdown table."""
    lines = ["| operation | estimates | bias | variance | does not hold |", "|---|---|---|---|---|"]
    lines += [_line(name, None, law) for name, law in _OPERATIONS.items()]
    return "\n".join(lines)


def _line(name: str, places: str | None, law: Law) -> str:
    cells = [name, *([] if places is None else [places])]
    cells += [law.estimates, f"{law.bias:g}", f"`{law.formula}`", law.fails_when]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
