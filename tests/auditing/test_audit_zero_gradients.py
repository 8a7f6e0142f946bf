"""Gradients that are zero but for rounding: no bias, and said to be out of sight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import cheapgrad
from cheapgrad import recipes


def make_convnet(seed: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Return a network whose convolutions' biases have no effect, since a batch norm follows."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU()
    )
    model = nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    return model, (torch.randn(32, 3, 16, 16), torch.randint(0, 10, (32,)))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("seed", range(4))
def test_rounding_of_a_zero_gradient_is_no_bias(seed: int) -> None:
    model, batch = make_convnet(seed)
    cheapgrad.approximate(model, recipes.speed(0.5), skip_small=False)
    report = cheapgrad.audit(model, loss_of, batch, draws=16)
    assert report.unbiased
    assert {"0.0.bias", "0.3.bias"} <= {layer.name for layer in report.layers if layer.detectable_relative_bias >= 1}
    assert "but not one as large as the gradient itself in" in report.verdict()


def test_an_error_in_a_convolution_is_found_beside_zero_gradients() -> None:
    model, batch = make_convnet(0)
    model[0][3].weight.register_hook(lambda grad: 1.01 * grad)
    report = cheapgrad.audit(model, loss_of, batch, draws=16, reference=_exact)
    assert [layer.name for layer in report.biased_layers] == ["0.3.weight"]


def _exact(model: nn.Module, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    model = make_convnet(0)[0]
    return list(torch.autograd.grad(loss_of(model, batch), list(model.parameters())))
