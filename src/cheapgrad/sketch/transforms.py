"""The one place that asks whether a tensor lives inside a torch.func transform."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch  # type: ignore[attr-defined] - private, and the only way to ask


def is_transformed(tensor: Tensor) -> bool:
    """Tell whether `tensor` is wrapped by ``torch.func`` (vmap, grad, ...): sizes and state may not depend on it.

    Inside compiled graphs the answer is no: the question itself cannot be traced.
    """
    return not torch.compiler.is_compiling() and _functorch.is_functorch_wrapped_tensor(tensor)
