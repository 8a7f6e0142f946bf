"""Networks, data and losses that the tests of Kronecker factors share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def double(model: nn.Module) -> nn.Module:
    return model.double().eval()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squared_loss(output: Tensor) -> Tensor:
    return 0.5 * output.square().sum()


def class_loss(output: Tensor) -> Tensor:
    """Cross-entropy summed over positions; its Hessian in the logits does not depend on the class."""
    flat = output.reshape(-1, output.shape[-1])
    return functional.cross_entropy(flat, flat.new_zeros(len(flat), dtype=torch.long), reduction="sum")


class Averaged(nn.Module):
    """A network per position, and the mean over positions."""

    def __init__(self, *layers: nn.Module, axis: int) -> None:
        super().__init__()
        self.layers, self.axis = nn.Sequential(*layers), axis

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean(self.axis)


class Classifier(nn.Module):
    """Features, the mean over positions (axis 2 on), and a linear head."""

    def __init__(self, features: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.features, self.head = features, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(2).mean(2))


class Tokens(nn.Module):
    """Embedding with padding, a linear map that is used twice, a norm, and the mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4, padding_idx=0)
        self.mix = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.mix(torch.tanh(self.mix(self.embed(x))))
        return self.head(self.norm(hidden).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False), nn.ReLU(inplace=True), nn.Linear(3, 3)
    )


def grouped_cnn() -> nn.Module:
    features = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, (2, 3), stride=(1, 2), padding="valid", dilation=(2, 1), bias=False),
        nn.GroupNorm(2, 6),
    )
    return Classifier(features, nn.Linear(6, 3))


def line_cnn() -> nn.Module:
    features = nn.Sequential(
        nn.Conv1d(2, 4, 4, padding="same", padding_mode="circular", groups=2),
        nn.InstanceNorm1d(4, affine=True),
        nn.Tanh(),
        nn.Conv1d(4, 4, 3, groups=4, padding=1, padding_mode="reflect"),
    )
    return Classifier(features, nn.Linear(4, 2))


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network in float64 and two batches for it."""
    torch.manual_seed(1)
    model, shape = {
        "mlp": (mlp, (4,)),
        "grouped cnn": (grouped_cnn, (2, 5, 6)),
        "line cnn": (line_cnn, (2, 6)),
        "tokens": (Tokens, (5,)),
        "sequence": (lambda: nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.Tanh(), nn.Linear(4, 2)), (3, 3)),
    }[name]
    network = double(model())
    for module in network.modules():
        # Running statistics and scales of a trained network are not zeros and ones.
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean, module.running_var = randn(4).clone(), randn(4).square() + 0.5
    if name == "tokens":
        return network, torch.randint(0, 6, (4, *shape)), torch.randint(0, 6, (3, *shape))
    return network, randn(4, *shape, seed=2), randn(3, *shape, seed=3)


NETWORKS = ("mlp", "grouped cnn", "line cnn", "tokens", "sequence")
