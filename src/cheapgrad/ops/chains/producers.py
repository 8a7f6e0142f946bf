"""What an operation before a layer holds of its own output, so that nobody has to hold it again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Nodes of the autograd graph whose output is, in memory, their input.
_VIEWS = frozenset(
    {
        "ViewBackward0",
        "UnsafeViewBackward0",
        "ReshapeAliasBackward0",
        "TransposeBackward0",
        "PermuteBackward0",
        "FlattenBackward0",
        "SqueezeBackward1",
    }
)
_LONGEST_PATH = 4


def is_held_by_attention(x: Tensor) -> bool:
    """Tell whether `x` is the output of an attention that keeps it for its own backward pass, or a view of it."""
    if torch.compiler.is_dynamo_compiling():
        return False
    node: Any = x.grad_fn
    for _ in range(_LONGEST_PATH):
        if node is None or node.name() not in _VIEWS:
            break
        node = node.next_functions[0][0]
    # Asked of the class: to read what the node holds would make a checkpoint run its block again.
    return node is not None and node.name().startswith("ScaledDotProduct") and hasattr(type(node), "_saved_output")
