"""The page on what a step costs: its programs run, its table is what they print."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent.parent / "docs" / "cost.md"


def test_programs_of_the_page_run_and_print_its_table(capsys):
    text = PAGE.read_text()
    names: dict[str, object] = {}
    # Without data it takes less time, and the figures are the same.
    shown = text.replace("scan(model, pictures)", "scan(model, pictures, fake=True)")
    for block in re.findall(r"```python\n(.*?)```", shown, flags=re.DOTALL):
        exec(compile(block, "cost.md", "exec"), names)
    [table] = re.findall(r"```text\n(.*?)```", text, flags=re.DOTALL)
    assert capsys.readouterr().out.splitlines()[1:] == table.splitlines()[1:]
    # The last block states the formula of an operator.
    assert "fused" in names
