"""``cheapgrad scan``."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from cheapgrad.cli import main
from cheapgrad.cost import CostReport

MODELS = """
import torch
from torch import nn

number = 3

def make():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(5, 8)

def with_keywords():
    return nn.Linear(8, 4), {"input": torch.randn(5, 8)}, lambda output: (output @ output.T).sum()

def huge():
    return nn.Linear(1 << 20, 1 << 20), torch.randn(1 << 20, 1 << 20)

def does_not_fit():
    return nn.Linear(8, 4), (torch.randn(5, 9),)

def raises():
    raise OSError("no weights here")

def full():
    raise MemoryError("no room")

def model_only():
    return nn.Linear(8, 4)

def four():
    return 1, 2, 3, 4
"""


@pytest.fixture(autouse=True)
def _models(tmp_path, monkeypatch):
    (tmp_path / "scan_models.py").write_text(MODELS)
    (tmp_path / "scan_broken.py").write_text("import no_such_library")
    monkeypatch.chdir(tmp_path)


def test_table(capsys):
    assert main(["scan", "scan_models:make"]) == 0
    printed = capsys.readouterr().out
    assert "Linear" in printed
    assert "a few steps for each element: relu" in printed
    assert main(["scan", "scan_models:make", "--top", "1"]) == 0
    assert "2 more modules" in capsys.readouterr().out
    assert main(["scan", "scan_models:make", "--top", "0"]) == 0
    assert "more modules" not in capsys.readouterr().out


def test_json_is_the_report(capsys):
    assert main(["scan", "scan_models:with_keywords", "--json"]) == 0
    report = CostReport.from_dict(json.loads(capsys.readouterr().out))
    assert report.row("").forward_flops == 2 * 5 * 8 * 4
    assert report.row("(outside)").forward_flops == 2 * 5 * 5 * 4


def test_fake_needs_no_memory(capsys):
    assert main(["scan", "scan_models:huge", "--fake", "--json"]) == 0
    report = CostReport.from_dict(json.loads(capsys.readouterr().out))
    assert report.total.forward_flops == 2 * (1 << 60)
    assert report.fake


@pytest.mark.parametrize("top", ["-3", "few"])
def test_number_of_lines_is_checked(capsys, top):
    with pytest.raises(SystemExit, match="2"):
        main(["scan", "scan_models:make", "--top", top])
    assert f"must be a whole number of at least 0, but got '{top}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("scan_models", "'scan_models' names no factory; write PACKAGE.MODULE:FACTORY"),
        ("scan_model:make", "cannot import 'scan_model': ModuleNotFoundError"),
        ("scan_broken:make", "cannot import 'scan_broken': ModuleNotFoundError: No module named 'no_such_library'"),
        ("scan_models:mak", "'scan_models' has no 'mak'; did you mean 'make'?"),
        ("scan_models:number", "'scan_models:number' is an int 3, not a function"),
        (
            "./scan_models.py:make",
            "'./scan_models.py' is the path of a file; name the module as an import does, scan_models",
        ),
        ("scan_models.py:make", "as an import does, scan_models:make, and run"),
        ("sub/scan_models:make", "as an import does, sub.scan_models:make, and run"),
        (".scan_models:make", "as an import does, scan_models:make, and run"),
        ("scan_models:full", "out of memory: no room"),
        ("scan_models:raises", "scan_models:raises raised OSError: no weights here"),
        ("scan_models:model_only", "(model, inputs, loss), but returned a Linear"),
        ("scan_models:four", "but returned a tuple of 4"),
        ("scan_models:does_not_fit", "in '(model)' (Linear) RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
    ],
)
def test_bad_input_is_one_line(capsys, factory, message):
    assert main(["scan", factory]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("cheapgrad: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def run_piped(arguments, stdout):
    return subprocess.run(
        [sys.executable, "-m", "cheapgrad", *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
    )


def test_reader_that_leaves_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        finished = run_piped(["scan", "scan_models:make"], pipe)
    assert (finished.returncode, finished.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        finished = run_piped(["scan", "scan_models:make", "--json"], full)
    assert finished.returncode == 2
    assert finished.stderr == "cheapgrad: error: cannot read or write the output: No space left on device\n"
