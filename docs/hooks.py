"""Build-time pages: the table of laws is written from the laws themselves."""

from __future__ import annotations

from typing import Any

from cheapgrad import sketch

_MARKER = "<!-- laws -->"
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
    return markdown.replace(_MARKER, laws_table()) if _MARKER in markdown else markdown


def laws_table() -> str:
    """Return the laws of all strategies as a Markdown table."""
    lines = ["| strategy | placed in | estimates | bias | variance | does not hold |", "|---|---|---|---|---|---|"]
    for strategy in _SHOWN:
        law = strategy.law
        places = ", ".join(f"`{moment.value}=`" for moment in law.moments)
        cells = [f"`{strategy!r}`", places, law.estimates, f"{law.bias:g}", f"`{law.formula}`", law.fails_when]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
