"""The programs of the pages on plans and on the controller run and print what these say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent.parent / "docs"


def run(page: str, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], list[str]]:
    """Run the programs of a page one after the other; return what they define, and what each of them prints."""
    names: dict[str, Any] = {}
    outputs = []
    for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL):
        exec(compile(block, page, "exec"), names)
        outputs.append(capsys.readouterr().out)
    return names, outputs


def test_programs_of_the_page_on_plans_run(capsys: pytest.CaptureFixture[str]) -> None:
    names, (table, totals, figures) = run("plan.md", capsys)
    assert "cheapgrad plan for flops='70 %'" in table
    assert "the plan beats a smaller batch of equal cost" in table
    assert names["plan"].backward_flops_fraction <= 0.7
    assert "of the mini-batch variance in units of the optimizer's steps (modelled from 4 batches" in totals
    steps, cost, beats = figures.split()
    # Where noise decides, the steps are multiplied by 1 + ω, and the cost by c (1 + ω).
    assert (float(steps), float(cost), beats) == (pytest.approx(1.085), pytest.approx(0.75 * 1.085), "True")


def test_programs_of_the_page_on_the_controller_run(capsys: pytest.CaptureFixture[str]) -> None:
    names, outputs = run("controller.md", capsys)
    noise, keep = map(float, outputs[0].split())
    # The target between trials: the one asked for, or somewhat less.
    assert 0.025 <= noise <= 0.05 * (1 + 1e-6)
    assert 0.05 <= keep <= 1
    [table] = re.findall(r"```text\n(.*?)```", (DOCS / "controller.md").read_text(), flags=re.DOTALL)
    assert table in outputs
    assert "compiled" in names
