"""Small networks with mistakes in their backward passes, and their right twins."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

B, I, H, C = 48, 12, 24, 5

# (x, weight, cotangent) -> gradients of x and of the weight.
Backward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class _Product(torch.autograd.Function):
    """``x @ weight.T`` with a backward pass of one's own, as users write it."""

    @staticmethod
    def forward(ctx, x, weight, backward):
        ctx.save_for_backward(x, weight)
        ctx.own_backward = backward
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return *ctx.own_backward(x, weight, grad), None


class OwnLinear(nn.Linear):
    """A linear layer with another backward pass, exact when `exact` is set."""

    def __init__(self, inputs: int, outputs: int, backward: Backward) -> None:
        super().__init__(inputs, outputs)
        self.own_backward = backward
        self.exact = False

    def forward(self, x: Tensor) -> Tensor:
        if self.exact:
            return functional.linear(x, self.weight, self.bias)
        return (_Product.apply(x.flatten(0, -2), self.weight, self.own_backward) + self.bias).unflatten(0, x.shape[:-1])


def exact(x, weight, grad):
    return grad @ weight, grad.T @ x


def one_percent_too_long(x, weight, grad):
    return grad @ weight, 1.01 * grad.T @ x


def top_rows(x, weight, grad):
    """Keep the rows with the largest cotangents, without weights."""
    kept = grad.norm(dim=1).topk(len(grad) // 2).indices
    return grad @ weight, grad[kept].T @ x[kept]


def sampled_rows(keep=0.5, weighted=True):
    """Keep rows by coin flips."""

    def backward(x, weight, grad):
        mask = (torch.rand(len(grad), 1) < keep).to(grad)
        return grad @ weight, (grad * (mask / keep if weighted else mask)).T @ x

    return backward


def sampled_twice(x, weight, grad):
    """Draw the indices of x and of its cotangent apart, as where they are drawn again in the backward pass."""
    half = len(grad) // 2
    first, second = torch.randperm(len(grad))[:half], torch.randperm(len(grad))[:half]
    return grad @ weight, 2 * grad[first].T @ x[second]


def noisy(sigma, scale=1.0):
    """Every entry off by independent noise, relative to the size of a typical entry."""

    def backward(x, weight, grad):
        truth = grad.T @ x
        return grad @ weight, scale * truth + sigma * truth.norm() / truth.numel() ** 0.5 * torch.randn_like(truth)

    return backward


def make_network(backward: Backward, dropout: float = 0.0, seed: int = 0) -> nn.Sequential:
    """Return a network whose second layer has its own backward pass."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(I, H), nn.Tanh(), nn.Dropout(dropout), OwnLinear(H, H, backward), nn.Tanh(), nn.Linear(H, C)
    )


def make_batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return inputs and classes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, I, generator=generator), torch.randint(C, (B,), generator=generator)


class _Draws(nn.Module):
    """A sketch that is drawn in front of a dropout, from the same generator."""

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(3)
        return x


def make_drawing_network() -> nn.Sequential:
    """Return a network with dropout; without its first layer it has other masks."""
    torch.manual_seed(0)
    return nn.Sequential(_Draws(), nn.Linear(I, 64), nn.Dropout(0.3), nn.Linear(64, C))


def make_even_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer that has stepped, and divides all entries by nearly the same."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for state in optimizer.state.values():
        state["exp_avg_sq"].fill_(1e6)
    return optimizer


def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy."""
    return functional.cross_entropy(model(batch[0]), batch[1])


def right_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the same loss with stock code: what `reference=` is for."""
    for module in model.modules():
        if isinstance(module, OwnLinear):
            module.exact = True
    try:
        return mean_loss(model, batch)
    finally:
        for module in model.modules():
            if isinstance(module, OwnLinear):
                module.exact = False
