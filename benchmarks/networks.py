"""Four networks that held bytes and step times are measured on, all of stock modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.vision_transformer import VisionTransformer
from cheapgrad import linear_cross_entropy

HEAD_WIDTH = 64


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int, is_causal: bool) -> Tensor:
    """Return attention over the middle axis of ``[B, T, D]``."""
    split = [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value)]
    mixed = functional.scaled_dot_product_attention(*split, is_causal=is_causal)
    return mixed.transpose(1, 2).flatten(2)


class EncoderBlock(nn.Module):
    """A block of BERT: norms after the sums, dropout of what is added.

    Args:
        width: features per token.
        dropout: share of entries that is dropped.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.attention_output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width)
        self.intermediate = nn.Linear(width, 4 * width)
        self.activation = nn.GELU()
        self.output = nn.Linear(4 * width, width)
        self.output_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return ``[B, T, D]``."""
        mixed = _attend(self.query(x_BTD), self.key(x_BTD), self.value(x_BTD), self.heads, is_causal=False)
        x_BTD = self.attention_norm(x_BTD + self.dropout(self.attention_output(mixed)))
        return self.output_norm(x_BTD + self.dropout(self.output(self.activation(self.intermediate(x_BTD)))))


class Encoder(nn.Module):
    """Token numbers ``[B, T]`` to class scores ``[B, 2]``, shaped like BERT.

    Args:
        width: features per token.
        depth: number of blocks.
        vocabulary: number of tokens.
        tokens: largest T.
        dropout: share of entries that is dropped.
    """

    def __init__(self, width: int, depth: int, vocabulary: int, tokens: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*[EncoderBlock(width, dropout) for _ in range(depth)])
        self.head = nn.Linear(width, 2)

    def forward(self, numbers_BT: Tensor) -> Tensor:
        """Return class scores."""
        x_BTD = self.dropout(self.norm(self.words(numbers_BT) + self.positions[:, : numbers_BT.shape[1]]))
        return self.head(self.blocks(x_BTD)[:, 0])


class DecoderBlock(nn.Module):
    """A block of GPT-2: norms before, attention to earlier tokens.

    Args:
        width: features per token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.activation = nn.GELU(approximate="tanh")
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return ``[B, T, D]``."""
        parts = self.query_key_value(self.attention_norm(x_BTD)).chunk(3, dim=-1)
        x_BTD = x_BTD + self.attention_output(_attend(*parts, self.heads, is_causal=True))
        return x_BTD + self.contract(self.activation(self.expand(self.feed_forward_norm(x_BTD))))


class LanguageModel(nn.Module):
    """Token numbers ``[B, T]`` to scores of the next token, ``[B, T, V]``, shaped like GPT-2, its head tied.

    Args:
        width: features per token.
        depth: number of blocks.
        vocabulary: V.
        tokens: largest T.
    """

    def __init__(self, width: int, depth: int, vocabulary: int, tokens: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.words.weight, std=0.02)
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.blocks = nn.Sequential(*[DecoderBlock(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.words.weight

    def forward(self, numbers_BT: Tensor, labels_BT: Tensor | None = None) -> Tensor:
        """Return scores of the next token; given labels the mean loss, without the scores ever being held whole."""
        features_BTD = self.norm(self.blocks(self.words(numbers_BT) + self.positions[:, : numbers_BT.shape[1]]))
        if labels_BT is None:
            return self.head(features_BTD)
        return linear_cross_entropy(features_BTD, self.head.weight, labels_BT, recompute=True)


class Bottleneck(nn.Module):
    """A residual block of BagNet: 1 x 1, then 3 x 3 or 1 x 1, then 1 x 1, each normalised over the batch.

    Args:
        inputs: channels of the input.
        width: channels inside.
        kernel: size of the middle convolution, 1 or 3.
        stride: of the middle convolution.
    """

    def __init__(self, inputs: int, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, kernel, stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        is_same = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Identity()
            if is_same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, 4 width, H / stride, W / stride]``."""
        return self.activation(self.body(x) + self.shortcut(x))


class BagNet(nn.Module):
    """Pictures ``[B, 3, 32, 32]`` to class scores ``[B, 10]`` from small patches, after Brendel and Bethge (2019).

    Args:
        width: channels of the first stage.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        plan = [
            (width, 3, 1),
            (width, 1, 1),
            (2 * width, 3, 2),
            (2 * width, 1, 1),
            (4 * width, 3, 2),
            (4 * width, 1, 1),
        ]
        blocks, inputs = [], width
        for inside, kernel, stride in plan:
            blocks.append(Bottleneck(inputs, inside, kernel, stride))
            inputs = 4 * inside
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores."""
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


@dataclass(frozen=True)
class Network:
    """A network with a batch of made-up data of its shape.

    Attributes:
        name: what tables call it.
        make: builds the model.
        make_batch: makes inputs and labels.
        target_ratio: how many times fewer bytes the memory recipe is to hold.
    """

    name: str
    make: Callable[[], nn.Module]
    make_batch: Callable[[], tuple[Tensor, Tensor]]
    target_ratio: float


def loss_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy over all that is classified."""
    scores = model(inputs)
    return functional.cross_entropy(scores.flatten(0, -2), labels.flatten())


NETWORKS: tuple[Network, ...] = (
    Network(
        "ViT 384 x 4",
        lambda: VisionTransformer(384, 4),
        lambda: (torch.randn(32, 64, 48), torch.randint(0, 10, (32,))),
        4.0,
    ),
    Network(
        "encoder 384 x 6",
        lambda: Encoder(384, 6, 8192, 64),
        lambda: (torch.randint(0, 8192, (16, 64)), torch.randint(0, 2, (16,))),
        4.0,
    ),
    Network(
        "language model 384 x 6",
        lambda: LanguageModel(384, 6, 8192, 64),
        lambda: (torch.randint(0, 8192, (16, 64)), torch.randint(0, 8192, (16, 64))),
        4.0,
    ),
    Network("BagNet", BagNet, lambda: (torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))), 2.5),
)
