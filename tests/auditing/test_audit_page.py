"""The programs of the page on audits run and print what it says."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent.parent / "docs" / "audit.md"


def test_programs_of_the_page_run(capsys):
    blocks = re.findall(r"```(python|text)\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    outputs = []
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, PAGE.name, "exec"), names)
            outputs.append(capsys.readouterr().out)
    assert len(outputs) == 4
    assert "UNBIASED as far as 64 draws show" in outputs[0]
    assert outputs[1:] == [block for kind, block in blocks if kind == "text" and block.startswith(("False", "ω 0"))]
