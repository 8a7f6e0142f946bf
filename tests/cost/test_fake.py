"""Scans without data say what scans with data say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cheapgrad
from cheapgrad.sketch import RowSample, StochasticRounding
from tests.cost.models import Branches, Checkpointed, Shared, TinyBert, make_batch, make_network


def make_converted():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    cheapgrad.approximate(model, cheapgrad.Rule("2", stored=RowSample(keep=0.25)), skip_small=False)
    return model, torch.randn(64, 16)


def make_rounded():
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8))
    cheapgrad.approximate(model, cheapgrad.Rule("*", stored=StochasticRounding(bits=4)), skip_small=False)
    return model, torch.randn(64, 16)


CASES = {
    "branches": lambda: (Branches(), torch.randn(4, 16)),
    "shared": lambda: (Shared(), torch.randn(4, 8)),
    "network": make_network,
    "reentrant": lambda: (Checkpointed("method", True), torch.randn(4, 16, requires_grad=True)),
    "encoder": lambda: (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(2, 5, 16)),
    "gru": lambda: (nn.GRU(5, 7), torch.randn(6, 3, 5)),
    "converted": make_converted,
    "rounded": make_rounded,
    "tied": lambda: (Tied(), torch.arange(4)),
}


class Tied(nn.Module):
    """One weight in two places, and a table that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 6)
        self.head = nn.Linear(6, 8, bias=False)
        self.head.weight = self.embedding.weight
        self.table = torch.randn(6)

    def forward(self, rows):
        return self.head(self.embedding(rows) + self.table)


@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_fake_report_is_the_real_one(make):
    model, x = make()
    real, fake = cheapgrad.scan(model, x), cheapgrad.scan(model, x, fake=True)
    assert fake.rows == real.rows
    assert fake.operations == real.operations
    assert fake.uncounted == real.uncounted
    assert (fake.fake, real.fake) == (True, False)


def test_fake_batch_of_keywords():
    model, batch = TinyBert(), make_batch()
    assert cheapgrad.scan(model, fake=True, **batch).rows == cheapgrad.scan(model, **batch).rows


def test_model_stays_real():
    model, picture = make_network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.seen = []
    model[8].register_forward_hook(lambda module, args, output: model.seen.append(output))
    cheapgrad.scan(model, picture, fake=True)
    assert all(type(value) is torch.Tensor for value in model.state_dict().values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("of_inputs", ["cpu", "meta"])
def test_models_that_fit_no_machine(of_inputs):
    with torch.device("meta"):
        model = nn.Sequential(nn.TransformerEncoderLayer(8192, 64, 32768, batch_first=True), nn.LSTM(8192, 8192))
    if of_inputs == "meta":
        x = torch.empty(16, 4096, 8192, device="meta")
    else:
        x = torch.empty(1, 8192).expand(16, 4096, 8192)
    report = cheapgrad.scan(model, x, fake=True)
    rows, width = 16 * 4096, 8192
    assert report.row("0.linear1").forward_flops == 2 * rows * width * 4 * width
    assert report.row("1").forward_flops == 2 * rows * 8 * width * width
    assert report.total.parameters > 1_000_000_000
    assert "without their workspace" in report.remarks[0]
