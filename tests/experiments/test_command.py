"""What the command says of arguments and files that cannot be right."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks.experiments.__main__ import RESULTS, main
from benchmarks.experiments.results import ResultsError, read_results


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["experiments", *map(str, arguments)])
    return main()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--seeds", "0"], "--seeds must be at least 1, but is 0"),
        (["--workers", "-1"], "--workers must be at least 1, but is -1"),
        (["--epochs", "0"], "--epochs must be above 0, but is 0"),
        (["--tasks", "nonsense"], "--tasks 'nonsense' matches none of the tasks"),
        (["--methods", "exact", "--methods", "nonsense"], "--methods 'nonsense' matches no method"),
        (["--data", "/nowhere/at/all.npz"], "/nowhere/at/all.npz"),
    ],
)
def test_arguments_that_cannot_be_right_are_named(arguments, text, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, *arguments, "--out", tmp_path / "out")
    assert caught.value.code == 2
    assert text in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_list_names_what_comes_before_the_trainings(monkeypatch, capsys, tmp_path):
    wanted = ["--tasks", "MLP*", "--seeds", "1", "--methods", "noise in units*"]
    assert call(monkeypatch, *wanted, "--fresh", "--list", "--out", tmp_path) == 0
    text = capsys.readouterr().out
    assert "MLP on digits: costs" in text
    assert "known once all costs are measured" in text


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:200],
        # Without some of the records that the rows name.
        lambda text: "\n".join(text.splitlines()[:30]),
    ],
)
def test_damaged_results_are_named_before_anything_is_written(damage, tmp_path):
    path = tmp_path / "mlp_on_digits.jsonl"
    shutil.copy(RESULTS / path.name, path)
    assert len(read_results(tmp_path)) == 1
    path.write_text(damage(path.read_text()))
    with pytest.raises(ResultsError, match=re.escape(str(Path(path)))):
        read_results(tmp_path)
