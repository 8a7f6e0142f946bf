"""In which precision a pass computes, whatever its parameters are in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def find_lowest_precision(run: Callable[[], object]) -> torch.dtype:
    """Return the coarsest type of the tensors that a forward pass holds for backward.

    Args:
        run: the pass.
    """
    dtypes = {torch.float64}

    def note(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            dtypes.add(tensor.dtype)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
