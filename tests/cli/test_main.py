"""The command line."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from functools import partial

import pytest

import cheapgrad
from cheapgrad.cli import main
from cheapgrad.demo import DigitsMLP
from cheapgrad.demo.setups import Setup
from tests.reporting.records import make_method, make_record, make_rows

TINY = Setup("tiny", "64 - 16 - 16 - 10", partial(DigitsMLP, 16), 32, 4, 1e-2, 24)
ROWS = "RowSample(keep=0.5)@cotangent"


@pytest.fixture
def tiny(monkeypatch):
    import cheapgrad.demo.run as module

    fields = {field.name: field for field in dataclasses.fields(module.DemoSettings)}
    assert fields["setups"].default is module.SETUPS
    original = module.DemoSettings
    monkeypatch.setattr(
        "cheapgrad.demo.DemoSettings", lambda **options: original(**options, setups=(TINY,), wide=TINY, workers=1)
    )


def failed(capsys, *arguments):
    """Run a command that has to fail with one line, and return that line."""
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.startswith("cheapgrad: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"cheapgrad {cheapgrad.__version__}\n"


def test_module_runs_as_the_command():
    output = subprocess.run(
        [sys.executable, "-m", "cheapgrad", "--version"], capture_output=True, text=True, check=True
    ).stdout
    assert output == f"cheapgrad {cheapgrad.__version__}\n"


def test_demo_prints_table_files_and_verdict(tiny, capsys, tmp_path):
    assert main(["demo", "--quick", "--out", str(tmp_path), "--strategy", ROWS]) == 0
    text = capsys.readouterr().out
    assert "RowSample(keep=0.5)@cotangent" in text
    assert "c(1+ω)" in text
    assert str(tmp_path / "demo.json") in text
    assert str(tmp_path / "demo.png") in text
    assert str(tmp_path / "report.html") in text
    assert "quick run" in text
    lines = text.rstrip().splitlines()
    assert sum(line.startswith("- ") for line in lines) == 6
    record = json.loads((tmp_path / "demo.json").read_text())
    assert record["seeds"] == [0]
    assert record["models"][0]["methods"][-1]["draws"] == 32


def test_json_alone_goes_to_standard_output(tiny, capsys, tmp_path):
    assert main(["demo", "--quick", "--seeds", "2", "--json", "--out", str(tmp_path), "--strategy", ROWS]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads((tmp_path / "demo.json").read_text())
    assert json.loads(captured.out)["seeds"] == [0, 1]
    assert "c(1+ω)" in captured.err


def test_bias_is_an_exit_status(monkeypatch, capsys, tmp_path):
    biased = make_record(make_method(), make_rows(unbiased=False, max_abs_z=math.inf))
    monkeypatch.setattr("cheapgrad.demo.run_demo", lambda *arguments: biased)
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "Bias: FOUND in cotangent rows 0.5 (z = inf)" in capsys.readouterr().out


def test_interruption(monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("cheapgrad.demo.run_demo", interrupt)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "cheapgrad: interrupted, nothing was written\n"


def test_unwritable_directory(capsys, tmp_path):
    blocker = tmp_path / "blocker"
    blocker.touch()
    assert f"cannot write to the output directory '{blocker}'" in failed(capsys, "demo", "--out", str(blocker))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required: COMMAND"),
        (("dmo",), "invalid choice: 'dmo'"),
        (("demo", "--seed", "3"), "unrecognized arguments: --seed 3"),
        (("demo", "--seeds", "three"), "invalid int value: 'three'"),
        (("demo", "--seeds", "0"), "seeds must be a whole number of at least 1, but got 0"),
        (("demo", "--strategy", "RowSampel(keep=0.5)@stored"), "did you mean 'RowSample'"),
        (("demo", "--strategy", "RowSample(keep=2)@stored"), "keep must be in (0, 1], but got 2"),
        (("demo", "--strategy", "LowRank(rank=65)@cotangent"), "LowRank(rank=65)@cotangent does not fit DigitsViT: "),
    ],
)
def test_bad_arguments(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in failed(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["sklearn.datasets", "matplotlib"])
def test_missing_extra(capsys, monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert "pip install 'cheapgrad[demo]'" in failed(capsys, "demo", "--out", str(tmp_path))
