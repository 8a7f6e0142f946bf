"""``cheapgrad audit``."""

from __future__ import annotations

import json

import pytest

from cheapgrad import AuditReport
from cheapgrad.cli import main

MODELS = """
import torch
from torch import nn
import cheapgrad
from cheapgrad.sketch import RowSample

torch.manual_seed(0)
x, y = torch.randn(32, 6), torch.randn(32, 3)

def loss_fn(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()

def network(dropout=0.0):
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3))

def good():
    model = network()
    cheapgrad.approximate(model, cheapgrad.Rule("*", cotangent=RowSample(keep=0.5)), skip_small=False)
    return model, loss_fn, (x, y)

def biased():
    def too_long(model, batch):
        return 1.01 * loss_fn(model, batch)
    return {"model": network(), "loss_fn": too_long, "batch": (x, y), "reference": loss_fn}

def loop():
    model = network()
    def accumulate():
        for part in (slice(0, 8), slice(8, 32)):
            (loss_fn(model, (x[part], y[part])) / 2).backward()
    return {"model": model, "loss_fn": loss_fn, "batch": (x, y), "accumulate": accumulate}

def with_dropout():
    return network(0.5), loss_fn, (x, y)

def without_batch():
    return {"model": network(), "loss_fn": loss_fn}

def misspelt():
    return {"model": network(), "loss_fn": loss_fn, "batch": (x, y), "accumulat": 1}

def with_optimizer():
    model, loss, batch = good()
    optimizer = torch.optim.Adam(model.parameters())
    loss(model, batch).backward()
    optimizer.step()
    return {"model": model, "loss_fn": loss, "batch": batch, "optimizer": optimizer}

def model_only():
    return network()
"""


@pytest.fixture(autouse=True)
def _models(tmp_path, monkeypatch):
    (tmp_path / "audit_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)


def test_unbiased_is_zero(capsys, tmp_path):
    assert main(["audit", "audit_models:good", "--draws", "32", "--json", "out/audit.json"]) == 0
    printed = capsys.readouterr().out
    assert "UNBIASED as far as 32 draws show" in printed
    report = AuditReport.from_dict(json.loads((tmp_path / "out" / "audit.json").read_text()))
    assert (report.draws, report.alpha, report.unbiased) == (32, 0.01, True)


@pytest.mark.parametrize(
    ("factory", "words"), [("biased", "BIASED in 4 of 4 parameters"), ("loop", "BIASED in 4 of 4 parameters")]
)
def test_biased_is_one(capsys, factory, words):
    assert main(["audit", f"audit_models:{factory}", "--draws", "8", "--alpha", "0.001"]) == 1
    printed = capsys.readouterr().out
    assert words in printed
    assert "(alpha 0.001, " in printed


def test_an_optimizer_gives_noise_its_unit(capsys):
    assert main(["audit", "audit_models:with_optimizer", "--draws", "8"]) == 0
    assert "in units of the optimizer's steps)." in " ".join(capsys.readouterr().out.split())


def test_seed_of_dropout(capsys):
    assert main(["audit", "audit_models:with_dropout"]) == 2
    assert "pass seed=0" in capsys.readouterr().err
    assert main(["audit", "audit_models:with_dropout", "--seed", "4", "--draws", "8"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["audit_models:model_only"], "must return (model, loss_fn, batch), but returned a Sequential"),
        (["audit_models:without_batch"], "returned a dictionary without 'batch'"),
        (["audit_models:misspelt"], "returned a dictionary with 'accumulat'; it may hold model,"),
        (["audit_models:good", "--draws", "7"], "draws must be a whole number of at least 8, but got 7"),
        (["audit_models:good", "--alpha", "2"], "alpha must be in (0, 1), but got 2.0"),
        (["audit_models:good", "--json", "audit_models.py/audit.json"], "cannot write to the output directory"),
        (["audit_models:good", "--json", "audit_models.py/audit.json"], "name another one with --json"),
        (["audit_models:good", "--json", "."], "it is a directory; name a file with --json"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, arguments, message):
    assert main(["audit", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("cheapgrad: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert {path.name for path in tmp_path.iterdir()} <= {"audit_models.py", "__pycache__"}
