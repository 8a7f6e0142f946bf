"""Small double-precision models with data, for comparison with dense matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Case:
    """A model, a loss and one batch; `run` applies the model to inputs of the batch's form."""

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    inputs: Any
    targets: Tensor
    run: Callable[[Callable[..., Any], Any], Tensor] = lambda model, inputs: model(inputs)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


class _Tokens(nn.Module):
    """Takes a dict's entries, has tied weights, and returns logits with the classes second."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(5, 3), nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
        hidden = torch.tanh(self.mix(self.embed(ids))) * scale[:, None, None]
        return self.head(hidden).movedim(-1, 1)


def _labels(count: int) -> Tensor:
    return torch.arange(count) % 3


def make_case(name: str, examples: int = 6) -> Case:
    """Return the case of that name, the same every time."""
    torch.manual_seed(7)
    generator = torch.Generator().manual_seed(3)

    def data(*shape: int) -> Tensor:
        return torch.randn(examples, *shape, generator=generator, dtype=torch.float64)

    cross_entropy = nn.CrossEntropyLoss()
    cases: dict[str, Callable[[], Case]] = {
        "MLP": lambda: Case(
            nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), cross_entropy, data(4), _labels(examples)
        ),
        "regression": lambda: Case(
            nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2)), nn.MSELoss(), data(4), data(2)
        ),
        "CNN with groups": lambda: Case(
            nn.Sequential(
                nn.Conv2d(2, 4, 3, groups=2), nn.Softplus(), nn.Conv2d(4, 2, 2, stride=2), nn.Flatten(), nn.Linear(2, 3)
            ),
            cross_entropy,
            data(2, 5, 5),
            _labels(examples),
        ),
        "attention": lambda: Case(_Attention(), cross_entropy, data(3, 4), _labels(examples)),
        "LSTM": lambda: Case(_Recurrent(), cross_entropy, data(3, 2), _labels(examples)),
        "batch norm": lambda: Case(
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sigmoid(), nn.Linear(4, 3)),
            cross_entropy,
            data(4),
            _labels(examples),
        ),
        "log_softmax inside": lambda: Case(
            nn.Sequential(nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(6, 3), nn.LogSoftmax(-1)),
            nn.NLLLoss(),
            data(1, 4),
            _labels(examples),
        ),
        "tokens": lambda: Case(
            _Tokens(),
            cross_entropy,
            {"ids": torch.randint(5, (examples, 4), generator=generator), "scale": data().abs()},
            torch.randint(5, (examples, 4), generator=generator),
            lambda model, inputs: model(**inputs),
        ),
    }
    case = cases[name]()
    case.model = case.model.double().eval()
    return case


NAMES = ("MLP", "regression", "CNN with groups", "attention", "LSTM", "batch norm", "log_softmax inside", "tokens")


def split(value: Any, sizes: list[int]) -> list[Any]:
    """Cut a tensor, or the tensors of a dict, along the examples."""
    if isinstance(value, dict):
        parts = {key: tensor.split(sizes) for key, tensor in value.items()}
        return [{key: tensors[index] for key, tensors in parts.items()} for index in range(len(sizes))]
    return list(value.split(sizes))
