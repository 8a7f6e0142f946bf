"""The two networks of the demo, written so that every linear map is a module of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

IMAGE_SIDE = 8
CLASSES = 10


class DigitsMLP(nn.Module):
    """A multilayer perceptron for 8 x 8 pictures: 64 - hidden - hidden - 10 with GELU.

    GELU holds its own input, as the linear layer behind it holds its output, so what a sketched linear layer does not
    store is really saved. (A ReLU would keep that same output alive.)

    Args:
        hidden: width of both hidden layers, at least 1.

    Attributes:
        checkpointed: whether each hidden layer with its activation is computed again during backward.
    """

    def __init__(self, hidden: int = 512) -> None:
        super().__init__()
        self.checkpointed = False
        pixels = IMAGE_SIDE * IMAGE_SIDE
        self.layers = nn.Sequential(
            nn.Linear(pixels, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, CLASSES)
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """Return class scores ``[B, C]`` of pictures ``[B, 8, 8]``."""
        rows = pictures.flatten(1)
        if not self.checkpointed:
            return self.layers(rows)
        for first in (0, 2):
            rows = checkpoint(self.layers[first : first + 2], rows, use_reentrant=False)
        return self.layers[4](rows)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        B, T, D = tokens_BTD.shape
        query, key, value = (
            self.query_key_value(tokens_BTD).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.output(mixed.transpose(1, 2).reshape(B, T, D))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        tokens_BTD = tokens_BTD + self.attention(self.attention_norm(tokens_BTD))
        return tokens_BTD + self.mlp(self.mlp_norm(tokens_BTD))


class DigitsViT(nn.Module):
    """A vision transformer for 8 x 8 pictures: 16 tokens of 2 x 2 pixels, pre-norm blocks, mean over the tokens.

    Args:
        width: features per token, a multiple of `heads`.
        depth: number of blocks, at least 1.
        heads: attention heads.

    Attributes:
        checkpointed: whether each block is computed again during backward.
    """

    patch_side = 2

    def __init__(self, width: int = 128, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.checkpointed = False
        tokens = (IMAGE_SIDE // self.patch_side) ** 2
        self.embedding = nn.Linear(self.patch_side**2, width)
        self.position = nn.Parameter(0.5 * torch.randn(tokens, width))
        self.blocks = nn.Sequential(*[_Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return class scores ``[B, C]`` of pictures ``[B, 8, 8]``."""
        side = self.patch_side
        patches = pictures.unfold(1, side, side).unfold(2, side, side).flatten(3).flatten(1, 2)
        tokens_BTD = self.embedding(patches) + self.position
        if self.checkpointed:
            for block in self.blocks:
                tokens_BTD = checkpoint(block, tokens_BTD, use_reentrant=False)
        else:
            tokens_BTD = self.blocks(tokens_BTD)
        return self.head(self.norm(tokens_BTD).mean(1))
