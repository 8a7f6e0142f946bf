"""Models to convert, and a picture of a model that shows any change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cheapgrad import Handle, Rule, approximate
from cheapgrad.sketch import RowSample

HALF = RowSample(keep=0.5)


class Block(nn.Module):
    """Two layers in a residual branch."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.relu(self.fc1(x)))


class Network(nn.Module):
    """Nested blocks, a norm and a head."""

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class OverridesForward(nn.Linear):
    """A subclass whose forward is its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class KeepsForward(nn.Linear):
    """A subclass that runs the stock forward."""


class Conv1D(nn.Module):
    """The GPT-2 style projection, as the transformers library writes it: weight ``[I, O]``, one addmm."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.nx = nx
        self.weight = nn.Parameter(0.1 * torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


def convert(model: nn.Module, *patterns: Any, strategy: Any = HALF) -> Handle:
    """Convert with one strategy for the cotangent, small layers too."""
    return approximate(model, *[Rule(pattern, cotangent=strategy) for pattern in patterns or ("*",)], skip_small=False)


def gradients(model: nn.Module, x: Tensor, seed: int = 3) -> list[Tensor]:
    """Return the gradients of a fixed scalar of the output with respect to the input and all parameters."""
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    output = model(x)
    weights = torch.linspace(-1, 1, output.numel(), device=x.device).view(output.shape).to(output.dtype)
    wanted = [x, *[parameter for parameter in model.parameters() if parameter.requires_grad]]
    return list(torch.autograd.grad((output * weights).sum(), wanted))


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Tell whether two lists of tensors agree bit for bit."""
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def picture(model: nn.Module) -> dict[str, Any]:
    """Return types, identities and values of everything in a model."""
    seen = {}
    for name, module in model.named_modules():
        attributes = {key: id(value) for key, value in module.__dict__.items()}
        tensors = {
            key: (id(value), value.requires_grad, value.detach().clone().flatten().tolist())
            for key, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        }
        seen[name] = (type(module), id(module), attributes, tensors, module.training)
    return seen
