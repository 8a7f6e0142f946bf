"""``cheapgrad report``."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

from cheapgrad.cli import main
from tests.reporting.page_reader import find, read, read_table, text_of
from tests.reporting.records import make_record


@pytest.fixture
def runs(tmp_path):
    directory = tmp_path / "runs"
    directory.mkdir()
    (directory / "demo.json").write_text(json.dumps(make_record().to_dict()))
    return directory


def test_page_is_written(runs, tmp_path, capsys):
    out = tmp_path / "new" / "report.html"
    assert main(["report", str(runs), "-o", str(out), "--title", "a < b"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}: 1 record of {runs}\n"
    assert captured.err == ""
    page = read(out.read_text())
    assert text_of(page.find(".//h1")) == "a < b"
    assert "No bias found" in text_of(find(page, "verdict"))
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


def test_page_is_here_unless_told(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "runs"]) == 0
    assert (tmp_path / "report.html").is_file()


def test_strangers_are_named_on_standard_error_and_on_the_page(runs, tmp_path, capsys):
    (runs / "package.json").write_text('{"name": "x"}')
    out = tmp_path / "report.html"
    assert main(["report", str(runs), "-o", str(out)]) == 0
    expected = "cheapgrad: not understood: package.json: it states no kind, and no record has its keys\n"
    assert capsys.readouterr().err == expected
    assert read_table(read(out.read_text()), "files")[1]["package.json"][0] == "not understood"


def failed(capsys, *arguments):
    assert main(["report", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("cheapgrad: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_broken_record_leaves_an_older_page_alone(runs, tmp_path, capsys):
    out = tmp_path / "report.html"
    out.write_text("old")
    (runs / "broken.json").write_text('{"kind": "cheapgrad.scan"')
    assert "'broken.json' is no JSON" in failed(capsys, runs, "-o", out)
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "runs"]


def test_missing_and_empty_directories(tmp_path, capsys):
    assert "does not exist" in failed(capsys, tmp_path / "missing", "-o", tmp_path / "report.html")
    (tmp_path / "empty").mkdir()
    assert "holds no record" in failed(capsys, tmp_path / "empty", "-o", tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_unwritable_output(runs, tmp_path, capsys, monkeypatch):
    (tmp_path / "blocker").touch()
    message = failed(capsys, runs, "-o", tmp_path / "blocker" / "report.html")
    assert "blocker" in message
    assert "name another one with --out" in message
    assert f"cannot write '{runs}': it is a directory; name a file with --out" in failed(capsys, runs, "-o", runs)

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    out = tmp_path / "report.html"
    assert "No space left on device" in failed(capsys, runs, "-o", out)
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blocker", "runs"]


MODELS = """
import torch
from torch import nn

def scanned():
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)), torch.randn(5, 8)

def audited():
    torch.manual_seed(0)
    model, inputs = scanned()
    return model, lambda model, batch: model(batch).square().mean(), inputs
"""


def test_commands_say_how_to_do_it_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report_models.py").write_text(MODELS)
    (tmp_path / "runs").mkdir()
    assert main(["scan", "report_models:scanned", "--json"]) == 0
    (tmp_path / "runs" / "exact.json").write_text(capsys.readouterr().out)
    assert main(["audit", "report_models:audited", "--draws", "8", "--json", "runs/audit.json"]) == 0
    assert main(["report", "runs"]) == 0
    page = read((tmp_path / "report.html").read_text())
    origin = text_of(find(page, "origin"))
    assert "exact.json: cheapgrad scan report_models:scanned" in origin
    assert "audit.json: cheapgrad audit report_models:audited --draws 8 --alpha 0.01" in origin
    assert str(tmp_path) not in origin
    headings, rows = read_table(page, "environment")
    assert headings == ["", "audit.json", "exact.json"]
    assert rows["torch"] == [torch.__version__] * 2


def test_program_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parent.parent.parent / "docs" / "report.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(compile(block, "report.md", "exec"), {})
    page = read((tmp_path / "report.html").read_text())
    assert "No bias found in 1 gradient" in text_of(find(page, "verdict"))
    headings, _ = read_table(page, "held-0-modules")
    assert headings == ["module", "exactmeasured", "sketchedmeasured"]
    assert read_table(page, "files")[1]["audit.json"][:2] == ["cheapgrad.audit", "0"]
