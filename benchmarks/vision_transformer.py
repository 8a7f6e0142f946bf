"""A plain vision transformer on patches, every linear map a module of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Pre-norm attention and feed-forward.

    Args:
        width: features per token.
        head_width: features per attention head.
    """

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.heads = width // head_width
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return ``[B, T, D]``."""
        B, T, D = x_BTD.shape
        projected = self.query_key_value(self.attention_norm(x_BTD))
        query, key, value = projected.view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(B, T, D)
        x_BTD = x_BTD + self.attention_output(mixed)
        hidden = functional.gelu(self.expand(self.feed_forward_norm(x_BTD)))
        return x_BTD + self.contract(hidden)


class VisionTransformer(nn.Module):
    """Patches ``[B, T, patch]`` to class scores ``[B, C]``.

    Args:
        width: features per token.
        depth: number of blocks.
        tokens: T.
        patch: numbers per patch.
        classes: C.
        head_width: features per attention head.
    """

    def __init__(
        self, width: int, depth: int, tokens: int = 64, patch: int = 48, classes: int = 10, head_width: int = 64
    ) -> None:
        super().__init__()
        self.embedding = nn.Linear(patch, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.blocks = nn.Sequential(*[Block(width, head_width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, patches: Tensor) -> Tensor:
        """Return class scores."""
        return self.head(self.norm(self.blocks(self.embedding(patches) + self.position)).mean(1))
