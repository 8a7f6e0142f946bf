"""The controller where rows of an example meet: draws that leave out whole examples do not hide the noise below."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import cheapgrad
from cheapgrad.sketch import RowSample

B, T, D, TARGET = 32, 4, 16, 0.6


class _Meeting(nn.Module):
    """A layer whose rows meet in their example's mean, and one above it."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.above = nn.Linear(D, D), nn.Linear(D, 4)

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden_BTD = torch.tanh(self.below(x_BTD))
        return self.above(hidden_BTD + 4 * hidden_BTD.mean(1, keepdim=True))


def _gradient(model: _Meeting, generator: torch.Generator) -> Tensor:
    x_BTD = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    weight = torch.rand(B, T, 1, generator=generator, dtype=torch.float64) ** 2
    direction = torch.randn(B, T, 4, generator=generator, dtype=torch.float64)
    loss = (weight * direction * model(x_BTD)).mean()
    weights = [model.below.weight, model.above.weight]
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)])


def test_noise_is_kept_where_whole_examples_are_left_out() -> None:
    torch.manual_seed(0)
    model = _Meeting().double()
    handle = cheapgrad.approximate(model, cheapgrad.Rule(cotangent=RowSample(0.5)), skip_small=False)
    controller = cheapgrad.Controller(handle, noise=TARGET, every=2)
    generator, noises = torch.Generator().manual_seed(1), []
    for step in range(1, 202):
        _gradient(model, generator)
        controller.step()
        if step > 100 and step % 20 == 1:
            in_force = handle.strategies()
            handle.replace_strategies({name: RowSample(keep) for name, keep in controller.keeps.items()})
            noises.append(_measure(handle, lambda generator: _gradient(model, generator)))
            handle.replace_strategies(in_force)
    assert sum(noises) / len(noises) == pytest.approx(TARGET, rel=0.2)
    assert max(noises) < 1.4 * TARGET


class _Attending(nn.Module):
    """One attention, whose two projections draw under one name."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.attention(x_BTD, x_BTD, x_BTD, need_weights=False)[0]


def test_noise_is_kept_where_a_layer_draws_more_than_once() -> None:
    torch.manual_seed(0)
    model = _Attending().double()
    handle = cheapgrad.approximate(model, cheapgrad.Rule(cotangent=RowSample(0.5)), skip_small=False)
    controller = cheapgrad.Controller(handle, noise=0.2, every=2)
    weights = [value for value in model.parameters() if value.dim() == 2]

    def gradient(generator: torch.Generator) -> Tensor:
        x_BTD = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
        weight = torch.rand(B, T, 1, generator=generator, dtype=torch.float64) ** 3
        loss = (weight * torch.randn(B, T, D, generator=generator, dtype=torch.float64) * model(x_BTD)).mean()
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)])

    generator, noises = torch.Generator().manual_seed(1), []
    for step in range(1, 202):
        gradient(generator)
        controller.step()
        if step > 100 and step % 20 == 1:
            in_force = handle.strategies()
            handle.replace_strategies({name: RowSample(keep) for name, keep in controller.keeps.items()})
            noises.append(_measure(handle, gradient))
            handle.replace_strategies(in_force)
    assert sum(noises) / len(noises) == pytest.approx(0.2, rel=0.25)


def _measure(handle: cheapgrad.Handle, gradient: Callable[[torch.Generator], Tensor]) -> float:
    exact, added = [], []
    for seed in range(100):
        with handle.exact():
            exact.append(gradient(torch.Generator().manual_seed(seed)))
        drawn = [gradient(torch.Generator().manual_seed(seed)) for _ in range(3)]
        added.append((torch.stack(drawn) - exact[-1]).square().sum(1).mean())
    return float(torch.stack(added).mean() / torch.stack(exact).var(0).sum())
