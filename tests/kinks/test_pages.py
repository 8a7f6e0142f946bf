"""The pages on kinks and on the cheap-gradient principle: their programs run, their table is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cheapgrad.kinks import measure_torch_conventions

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.mark.parametrize("page", ["kinks.md", "cheap_gradient_principle.md"])
def test_programs_of_the_page_run(page, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        # Fewer trials take less time; nothing else differs from what the reader runs.
        exec(compile(block.replace("trials=200", "trials=5"), page, "exec"), names)
    assert len(blocks) >= 2
    printed = capsys.readouterr().out
    expected = {
        "kinks.md": ["Counter({'relu': 1})", "tensor([1.])", "max_pool2d_with_indices  bfloat16     50  230,400"],
        "cheap_gradient_principle.md": ["measured 3.000, at most 3.038", "\n64 129.0 116.4\n2.8 0.9"],
    }
    assert all(text in printed for text in expected[page])


def test_table_of_the_page_is_what_torch_returns():
    table = (DOCS / "kinks.md").read_text().split("<!-- conventions -->")[1].split("\n\n")[1]
    written = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    measured = [[f"`{row.function}`", _write(row.point), _write(row.gradient)] for row in measure_torch_conventions()]
    assert written == measured


def _write(numbers):
    return ", ".join(f"{number:.5g}" for number in numbers)
