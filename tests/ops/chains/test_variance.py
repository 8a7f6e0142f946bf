"""A chain's draw adds no more variance than a draw per layer, on a small trained network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cheapgrad import Rule, approximate
from cheapgrad.ops.chains import joining
from cheapgrad.sketch import RowSample

WIDTH, TOKENS, DRAWS = 32, 8, 250


class Block(nn.Module):
    """A pre-norm feed-forward block."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.expand, self.contract = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.contract(nn.functional.gelu(self.expand(self.norm(x))))


def trained():
    """Return a network of blocks on tokens, trained to tell which token is largest along a direction, and a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(3)], nn.Linear(WIDTH, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    direction = torch.randn(WIDTH)
    for _ in range(120):
        x = torch.randn(32, TOKENS, WIDTH)
        loss = loss_of(model, x, direction)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, x, direction


def loss_of(model, x, direction):
    return nn.functional.cross_entropy(model(x).squeeze(-1), (x @ direction).abs().argmax(1))


@pytest.mark.parametrize("keep", [0.5, 0.25])
def test_no_more_variance_than_a_draw_per_layer(keep, monkeypatch):
    model, x, direction = trained()
    parameters = list(model.parameters())

    def gradient():
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(model, x, direction), parameters)])

    exact = gradient()
    approximate(model, Rule(cotangent=RowSample(keep)), skip_small=False)

    def errors():
        return torch.stack([(gradient() - exact).square().sum() / exact.square().sum() for _ in range(DRAWS)])

    chained = errors()
    monkeypatch.setattr(joining, "chain_of", lambda x: None)
    monkeypatch.setattr(joining, "recognise_chain", lambda x, *rest: None)
    apart = errors()
    difference = chained.mean() - apart.mean()
    error = ((chained.var() + apart.var()) / DRAWS).sqrt()
    assert error < 0.05 * apart.mean(), "inconclusive"
    assert difference < 3 * error
