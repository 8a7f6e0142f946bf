"""Embeddings: linear maps of one-hot rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from cheapgrad.curvature.kronecker.layers.abstract import AbstractLayer, Use
from cheapgrad.curvature.kronecker.rows import OneHotRows


@final
class EmbeddingLayer(AbstractLayer):
    """`torch.nn.Embedding` on indices ``[B, ...]``: the activations' factor is the diagonal of index frequencies."""

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)

    @property
    def shape(self) -> tuple[int, int, int]:
        """One group, the embedding's width, the vocabulary."""
        own: Any = self.module
        return 1, own.embedding_dim, own.num_embeddings

    @property
    def is_input_diagonal(self) -> bool:
        """True: two indices never meet in one row."""
        return True

    def find_obstacle(self) -> str | None:
        """Return the setting under which the layer is not linear in its weight."""
        own: Any = self.module
        if own.max_norm is not None:
            return f"max_norm={own.max_norm} changes the weight in every forward pass"
        if own.scale_grad_by_freq:
            return "scale_grad_by_freq=True makes its gradient another than that of the loss"
        return None

    def read_use(self, x: Tensor, output: Tensor, examples: int) -> Use:
        """Return the indices; rows of the padding index are zero."""
        self._check_examples(x, examples)
        own: Any = self.module
        index_BT = x.reshape(examples, -1)
        kept_BT = torch.ones_like(index_BT, dtype=torch.bool)
        if own.padding_idx is not None:
            kept_BT = index_BT != own.padding_idx
        return Use(OneHotRows(index_BT.clone(), kept_BT, own.num_embeddings, own.weight.dtype), output)

    def read_cotangent(self, use: Use, cotangent: Tensor) -> Tensor:
        """Return ``[1, B, T, O]``."""
        return cotangent.reshape(1, cotangent.shape[0], -1, cotangent.shape[-1])

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the transposed weight."""
        return tensors["weight"].mT[..., None, :, :]

    def unpack(self, block_QOI: Tensor) -> dict[str, Tensor]:
        """Return the weight."""
        return {"weight": block_QOI[..., 0, :, :].mT}
