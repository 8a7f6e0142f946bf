"""The kinds of modules that can be converted: one file for each family."""

from __future__ import annotations

from cheapgrad.convert.kinds.attention import ATTENTION
from cheapgrad.convert.kinds.convolution import CONVOLUTIONS
from cheapgrad.convert.kinds.dropout import DROPOUTS
from cheapgrad.convert.kinds.embedding import EMBEDDING
from cheapgrad.convert.kinds.fixed_maps import FIXED_MAPS
from cheapgrad.convert.kinds.layer_kind import LayerKind, LayerUse
from cheapgrad.convert.kinds.linear import LINEAR, TRANSPOSED_LINEAR
from cheapgrad.convert.kinds.norms import NORMS
from cheapgrad.convert.kinds.pooling import POOLINGS
from cheapgrad.convert.kinds.prelu import PRELU
from cheapgrad.convert.kinds.rms_norm import RMS_NORMS
from cheapgrad.convert.kinds.row_wise import ROW_WISE
from cheapgrad.convert.kinds.transformers_activations import TRANSFORMERS_ACTIVATIONS

KINDS: tuple[LayerKind, ...] = (
    LINEAR,
    TRANSPOSED_LINEAR,
    ATTENTION,
    EMBEDDING,
    *CONVOLUTIONS,
    *ROW_WISE,
    *NORMS,
    *DROPOUTS,
    *POOLINGS,
    *FIXED_MAPS,
    PRELU,
    *RMS_NORMS,
    *TRANSFORMERS_ACTIVATIONS,
)


def kind_of(cls: type) -> LayerKind | None:
    """Return the kind of a module class, or None if it cannot be converted.

    >>> import torch
    >>> kind_of(torch.nn.Linear).name
    'Linear'
    """
    return next((kind for kind in KINDS if kind.accepts(cls)), None)


__all__ = ["KINDS", "LayerKind", "LayerUse", "kind_of"]
