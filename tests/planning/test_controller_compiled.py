"""Compiled models: a few budgets are compiled once each and hold; control of them is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import cheapgrad
from cheapgrad.errors import ControlError
from cheapgrad.sketch import RowSample

BUDGETS = (0.5, 0.75, 0.5, 0.9, 0.75, 0.5)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _setup(backend: Any) -> tuple[nn.Sequential, nn.Module, cheapgrad.Handle]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 4))
    handle = cheapgrad.approximate(model, cheapgrad.Rule(cotangent=RowSample(0.5)), skip_small=False)
    compiled: Any = torch.compile(model, backend=backend)
    return model, compiled, handle


def _gradient(model: nn.Sequential, compiled: nn.Module, x: Tensor) -> Tensor:
    return torch.autograd.grad(compiled(x).square().mean(), model[0].weight)[0]


def test_a_few_budgets_are_compiled_once_each_and_are_kept() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model, compiled, handle = _setup(counter)
    x, variances, frames = torch.randn(64, 12), {}, {}
    for keep in BUDGETS:
        handle.replace_strategies({name: RowSample(keep) for name in handle.strategies()})
        draws = torch.stack([_gradient(model, compiled, x) for _ in range(40)])
        variances[keep] = draws.var(0).sum()
        frames.setdefault(keep, counter.frame_count)
    assert len(set(frames.values())) == 3
    # Going back to a budget compiles nothing.
    assert counter.frame_count == max(frames.values())
    # Draws are fresh, and each budget is in force: at the first one's, all variances would be alike.
    assert variances[0.5] > 1.5 * variances[0.75] > 2 * variances[0.9] > 0


def test_control_of_a_compiled_model_is_refused_by_name() -> None:
    model, compiled, handle = _setup("aot_eager")
    controller = cheapgrad.Controller(handle, noise=0.1)
    x = torch.randn(64, 12)
    for _ in range(2):
        compiled(x).square().mean().backward()
        controller.step()
    compiled(x).square().mean().backward()
    with pytest.raises(ControlError, match=r"compiled.*train eagerly.*controller\.strategies"):
        controller.step()
    # The same model under control without the compiler.
    controller = cheapgrad.Controller(handle, noise=0.1)
    for _ in range(3):
        model(x).square().mean().backward()
        controller.step()
    assert controller.noise == pytest.approx(0.1, rel=0.2)
