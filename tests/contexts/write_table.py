"""Write `docs/compatibility.md` from the table: ``python -m tests.contexts.write_table``."""

from __future__ import annotations

from pathlib import Path

from tests.contexts.table import CONTEXTS, REFUSALS, ROWS, Row

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"

_HEAD = """\
# Compatibility

<!-- Written by `python -m tests.contexts.write_table`; do not edit. -->

What `tests/contexts` runs. In every entry the input is the identity and the cotangent is diagonal, so that one draw
shows whether forward and backward used the same sample; the mean of a fixed number of draws has to agree with the exact
gradient within its confidence interval; and steps have to differ. The same tests run on CUDA where there is a GPU, and
are listed as not run where there is none.

## Layers and contexts

How many combinations of strategies are tested. Members of a family (smooth activations, those of two slopes, dropouts,
norms over images, maximum pooling, averages and padding) share one operation and differ in a formula or in the number
of axes: the first of each family runs everywhere, and the others, "·" elsewhere, only where their own formula meets
other axes or numbers (eager, mapped, in lower precision).
"""

_RULES = """\
## Layers, strategies and contexts

✓ is tested; · is not tested for this row, because a run is dear and the row is like one that is.
"""

_REFUSED = """\
## What is refused

Always by a named error that says what to do.
"""

_NOTES = """\
## Worth knowing

- Inside compiled graphs nothing is remembered between steps: `PredictedNorm` is `StoredNorm` there, and
  `LowRank(refresh=...)` finds its basis anew in every step.
- Under `torch.no_grad()` in training mode the values are the stock ones, but what is stored is drawn all the same:
  a reentrant checkpoint runs its first forward that way, and both runs have to leave the same random state.
- Processes seeded alike draw different sketches: the rank is folded into every draw.
- Conversion comes first: `approximate`, then `torch.compile` or `fully_shard`. `DistributedDataParallel` and
  `DataParallel` work in either order.
"""


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(head: list[str], lines: list[list[str]]) -> list[str]:
    return [_line(head), _line(["---"] * len(head)), *map(_line, lines), ""]


def _layer_lines() -> list[list[str]]:
    lines = []
    for layer in dict.fromkeys(row.layer for row in ROWS):
        rows = [row for row in ROWS if row.layer == layer]
        counts = [sum(context.covers(row) for row in rows) for context in CONTEXTS]
        lines.append([layer.name, *[str(count) if count else "·" for count in counts]])
    return lines


def _row_lines() -> list[list[str]]:
    return [
        [row.layer.name, _strategies(row), *["✓" if context.covers(row) else "·" for context in CONTEXTS]]
        for row in ROWS
    ]


def _strategies(row: Row) -> str:
    return f"`{row.strategies}`" if row.layer.stock is None else row.strategies


def _lacks() -> list[str]:
    """Return a line for every entry that PyTorch itself cannot run."""
    titles = {context.key: context.title for context in CONTEXTS}
    cases = dict.fromkeys(row.layer for row in ROWS)
    return [f"- {case.name}, {titles[key]}: not run; {reason}." for case in cases for key, reason in case.lacks]


def render() -> str:
    """Return the page as Markdown."""
    titles = [context.title for context in CONTEXTS]
    parts = [
        _HEAD,
        *_table(["layer", *titles], _layer_lines()),
        *_table(["context", "what is run"], [[context.title, context.explanation] for context in CONTEXTS]),
        _RULES,
        *_table(["layer", "strategies", *titles], _row_lines()),
        _REFUSED,
        *_table(
            ["what is asked for", "error", "what to do"],
            [[refusal.situation, f"`{refusal.error}`", refusal.remedy] for refusal in REFUSALS],
        ),
        _NOTES + "\n".join([*_lacks(), ""]),
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
