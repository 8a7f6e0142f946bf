"""Convolution layers that the tests share, and a fixed number of draws of their gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor, nn

from cheapgrad.ops.convolution import ConvolutionConfig, sketched_convolution
from cheapgrad.ops.plan import Plan
from cheapgrad.sketch import AbstractStrategy, Moment

MODULES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SIZES = {1: (9,), 2: (6, 7), 3: (5, 4, 6)}
# False alarms of the whole file together: one in a million, over some 10_000 coordinates and 200 tests.
_BAND = NormalDist().inv_cdf(1 - 1e-6 / 2 / 10_000 / 200)


@dataclass(frozen=True)
class Layer:
    """A layer in float64 with an input, a cotangent and its exact gradients (input, weight, bias)."""

    module: nn.Module
    x: Tensor
    grad: Tensor
    exact: tuple[Tensor, ...]

    @property
    def config(self) -> ConvolutionConfig:
        return ConvolutionConfig.from_module(self.module)

    @property
    def parameters(self) -> tuple[Tensor, Tensor]:
        return self.module.weight.detach(), self.module.bias.detach()


def build(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Layer:
    """Return the layer with skewed input and cotangent, so that scores differ."""
    module = module.to(dtype)
    x = (torch.randn(shape) * torch.rand(shape[0], 1, *shape[2:])).to(dtype).requires_grad_()
    output = module(x)
    grad = torch.randn_like(output) * torch.rand_like(output[:, :1])
    exact = torch.autograd.grad(output, (x, module.weight, module.bias), grad)
    return Layer(module, x.detach(), grad, exact)


def geometries() -> Iterator[tuple[str, nn.Module, tuple[int, ...]]]:
    """Yield dims × groups × dilation × stride × padding, and the transposed layers."""
    for axes, groups, dilation, stride in itertools.product((1, 2, 3), (1, 2), (1, 2), (1, 2)):
        shape = (4, 4, *SIZES[axes])
        name = f"{axes}d-groups{groups}-dilation{dilation}-stride{stride}"
        options = {"groups": groups, "dilation": dilation, "stride": stride}
        for mode in ("zeros", "reflect", "replicate", "circular"):
            yield f"{name}-{mode}", MODULES[axes](4, 6, 2, padding=1, padding_mode=mode, **options), shape
        extra = {"padding": 1, "output_padding": int(max(stride, dilation) > 1)}
        yield f"{name}-transposed", TRANSPOSED[axes](4, 6, 3, **options, **extra), shape
    for axes, padding, mode, kernel in itertools.product((1, 2, 3), ("same", "valid"), ("zeros", "circular"), (2, 3)):
        module = MODULES[axes](4, 6, kernel, padding=padding, padding_mode=mode, dilation=1, groups=2)
        yield f"{axes}d-{padding}-{mode}-kernel{kernel}", module, (3, 4, *SIZES[axes])
    yield "2d-depthwise", nn.Conv2d(4, 4, 3, padding=1, groups=4), (3, 4, 5, 5)
    yield "2d-uneven", nn.Conv2d(3, 5, (3, 2), stride=(1, 2), padding=(0, 1), dilation=(2, 1)), (3, 3, 7, 5)
    yield "2d-transposed-uneven", nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), 2), (3, 4, 4, 3)


def plan_of(strategy: AbstractStrategy, moment: Moment) -> Plan:
    """Return a plan with one strategy."""
    return Plan(**{moment.value: strategy, f"{moment.value}_memory": strategy.new_memory()})


def run(layer: Layer, plan: Plan) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return output and gradients of one eager step."""
    x = layer.x.clone().requires_grad_()
    module = layer.module
    output = sketched_convolution(x, module.weight, module.bias, layer.config, plan)
    return output, torch.autograd.grad(output, (x, module.weight, module.bias), layer.grad)


def draw_gradients(layer: Layer, plan: Plan, draws: int) -> tuple[Tensor, ...]:
    """Return that many independent draws of the gradients, as one batch."""
    weight, bias = layer.parameters

    def one(_: Tensor) -> tuple[Tensor, ...]:
        inputs = (layer.x, weight, bias)
        _, pull_back = torch.func.vjp(lambda *args: sketched_convolution(*args, layer.config, plan), *inputs)
        return pull_back(layer.grad)

    return torch.func.vmap(one, randomness="different")(torch.zeros(draws))


def draws_needed(variance: float, exact: Tensor) -> int:
    """Return how many draws bring the standard error to 1 % of the truth, at least 4000."""
    return max(4_000, math.ceil(1e4 * variance / exact.square().sum().item()))


def assert_unbiased(drawn: Tensor, exact: Tensor, largest_relative_error: float = 0.011) -> None:
    """Compare every coordinate's mean with a Bonferroni band, after checking that the band is narrow enough."""
    draws = drawn.shape[0]
    error = drawn - exact
    standard_error = error.std(0) / math.sqrt(draws)
    relative = (standard_error.square().sum() / exact.square().sum()).sqrt().item()
    assert relative <= largest_relative_error, f"inconclusive: standard error {relative:.3%} of the truth"
    band = _BAND * standard_error + 1e-12 * exact.abs().max()
    worst = (error.mean(0).abs() / band).max().item()
    assert worst <= 1, f"biased: {worst:.2f} times the band"


def assert_variance(drawn: Tensor, exact: Tensor, predicted: float) -> None:
    """Compare the measured with the predicted squared error."""
    measured = (drawn - exact).flatten(1).square().sum(1).mean().item()
    assert 0.95 <= measured / predicted <= 1.05, f"measured {measured:.4g}, predicted {predicted:.4g}"
