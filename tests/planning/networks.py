"""Networks and batches to plan for, in double precision, small and without dropout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

import cheapgrad
from cheapgrad.cost import CostReport

Batch = tuple[Tensor, Tensor]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def make_mlp(depth: int = 8, width: int = 24, classes: int = 5) -> nn.Module:
    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.GELU()]
    model = nn.Sequential(*layers, nn.Linear(width, classes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough for gradients to reach the first layer.
            parameter.mul_(2.0)
    return model.train()


def make_vit(depth: int = 4) -> nn.Module:
    torch.manual_seed(4)
    return SmallViT(depth).double().train()


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        query, key, value = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        scores = (query @ key.transpose(-1, -2) / (D // self.heads) ** 0.5).softmax(-1)
        x = x + self.proj((scores @ value).transpose(1, 2).reshape(B, T, D))
        return x + self.contract(functional.gelu(self.expand(self.norm2(x))))


class SmallViT(nn.Module):
    def __init__(self, depth: int, width: int = 16, patch: int = 12, classes: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Linear(patch, width)
        self.blocks = nn.Sequential(*[Block(width, 2) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, patches: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(patches))).mean(1))


def make_convolutions() -> nn.Module:
    torch.manual_seed(5)
    return (
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(8, 12, 3, padding=1, stride=2),
            nn.GELU(),
            nn.Conv2d(12, 12, 3, padding=1, groups=2),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(12 * 16, 5),
        )
        .double()
        .train()
    )


def make_batches(shape: Sequence[int], count: int = 4, examples: int = 24, classes: int = 5) -> list[Batch]:
    generator = torch.Generator().manual_seed(6)
    return [
        (
            torch.randn(examples, *shape, generator=generator, dtype=torch.float64),
            torch.randint(0, classes, (examples,), generator=generator),
        )
        for _ in range(count)
    ]


def scan_step(model: nn.Module, batch: Batch) -> CostReport:
    """Return the ledger of a step, loss included, by cheapgrad's own formulas."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: Batch) -> Tensor:
            return loss_fn(self.model, batch)

    return cheapgrad.scan(Whole(), batch)


def exact_gradients(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    """Return one row for each batch: the gradient of all parameters."""
    return [flat_gradient(model, batch) for batch in batches]


def flat_gradient(model: nn.Module, batch: Batch) -> Tensor:
    gradients = torch.autograd.grad(loss_fn(model, batch), list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def measure_noise(
    model: nn.Module, batches: Sequence[Batch], exact: Sequence[Tensor], draws: int
) -> tuple[float, float]:
    """Return the mean squared error of a converted model's gradient over the mini-batch variance, and its error."""
    torch.manual_seed(8)
    variance = torch.stack(list(exact)).var(0).sum()
    errors = torch.stack(
        [
            (flat_gradient(model, batch) - gradient).square().sum() / variance
            for _ in range(draws)
            for batch, gradient in zip(batches, exact, strict=True)
        ]
    )
    return float(errors.mean()), float(errors.std() / len(errors) ** 0.5)
