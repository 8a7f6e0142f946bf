"""``cheapgrad curvature``."""

from __future__ import annotations

import json
import sys

import pytest

from cheapgrad.cli import main
from cheapgrad.curvature.bias_report import BiasReport

MODELS = """
import torch
from torch import nn
from cheapgrad.curvature import DenseOperator, MeanOperator

generator = torch.Generator().manual_seed(0)
x = torch.randn(300, 6, generator=generator)
y = (x[:, 0] > 0).long()

def covariance(rows):
    return rows.T @ rows / len(rows)

def operators():
    parts = [DenseOperator(covariance(part), example_count=20) for part in x[20:].split(20)]
    return DenseOperator(covariance(x[:20]), example_count=20), MeanOperator(parts)

def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    return model, nn.CrossEntropyLoss(), (x[:20], y[:20]), list(zip(x[20:].split(40), y[20:].split(40)))

def wrong_width():
    model, loss, batch, batches = network()
    return model, loss, (batch[0][:, :4], batch[1]), batches

def halves():
    return tuple(DenseOperator(covariance(part), example_count=150) for part in x.split(150))

def same_twice():
    return 2 * (DenseOperator(torch.eye(3)),)

def one():
    return torch.eye(3)

def too_narrow():
    model, loss, first, others = network()
    return model, loss, first, [others[0], (torch.randn(20, 5), y[:20])]

class Fails:
    shape = (3, 3)
    def __matmul__(self, other):
        raise KeyError("no product today")

def fails():
    return Fails(), Fails()

def three():
    return 1, 2, 3

def no_operators():
    return "a", "b"
"""


@pytest.fixture(autouse=True)
def _models(tmp_path, monkeypatch):
    (tmp_path / "curvature_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "curvature_models", raising=False)


def run(capsys, *arguments):
    assert main(["curvature", *arguments]) == 0
    return capsys.readouterr()


def test_table_and_files(capsys, tmp_path):
    printed = run(capsys, "curvature_models:operators", "--count", "3", "--out", "results").out
    assert "too large" in printed
    assert "all 3 directions: same batch ÷ corrected = " in printed
    report = BiasReport.from_dict(json.loads((tmp_path / "results" / "curvature.json").read_text()))
    assert len(report.rows) == 3
    assert report.micro_batches == 14
    assert (tmp_path / "results" / "curvature.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_and_its_batches(capsys):
    out = run(capsys, "curvature_models:network", "--count", "2", "--json", "--level", "0.9").out
    report = BiasReport.from_dict(json.loads(out))
    assert report.level == 0.9
    assert report.micro_batches == 7
    assert report.rows[0].same_batch > report.rows[1].same_batch > 0


def test_smallest_and_population(capsys):
    out = run(capsys, "curvature_models:operators", "--count", "1", "--smallest", "--population", "300", "--json").out
    report = BiasReport.from_dict(json.loads(out))
    # The batches are the whole population: the corrected value is exact.
    assert report.rows[0].standard_error == 0
    assert report.rows[0].same_batch < report.rows[0].corrected


def test_two_single_batches_that_are_the_population(capsys):
    out = run(capsys, "curvature_models:halves", "--count", "2", "--population", "300", "--json").out
    report = BiasReport.from_dict(json.loads(out))
    assert [row.low for row in report.rows] == [row.corrected for row in report.rows]


def test_no_work_is_done_where_no_picture_can_be_drawn(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["curvature", "no_such_module:x"]) == 2
    assert "pip install 'cheapgrad[report]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("curvature_models:one",), "must return (operator_a, operator_b) or (model, loss, batches_a, batches_b), but"),
        (("curvature_models:three",), "but returned a tuple of 3"),
        (("curvature_models:no_operators",), "an operator has a shape and multiplies with @, but got a str 'a'"),
        (("curvature_models:same_twice", "--count", "1"), "share 1 of 1 micro-batches"),
        (("curvature_models:operators",), "count=20 directions were asked of a curvature with 6 parameters"),
        (("curvature_models:operators", "--count", "2", "--level", "95"), "level must be in (0, 1), but got 95.0"),
        (
            ("curvature_models:operators", "--count", "2", "--population", "9"),
            "cannot be disjoint in a population of 9",
        ),
        (
            ("curvature_models:wrong_width", "--count", "2"),
            "the forward pass raised in '0' (Linear) RuntimeError: mat1 and mat2 shapes cannot be multiplied",
        ),
        (
            ("curvature_models:too_narrow", "--count", "2"),
            "error: batch 1 of batches_b: the forward pass raised in '0' (Linear) RuntimeError: mat1 and mat2",
        ),
        (("curvature_models:fails", "--count", "2"), "what curvature_models:fails returned raised KeyError"),
        (("curvature_models:operatorz",), "did you mean 'operators'"),
        (("no_such_module:x",), "cannot import 'no_such_module'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(capsys, tmp_path, arguments, message):
    assert main(["curvature", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"curvature_models.py"}
