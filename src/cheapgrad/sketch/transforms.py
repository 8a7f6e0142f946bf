"""The one place that asks whether a tensor lives inside a torch.func transform."""

from __future__ import annotations

from torch import Tensor
from torch._C import _functorch  # type: ignore[attr-defined] - private, and the only way to ask


def is_transformed(tensor: Tensor) -> bool:
    """Tell whether `tensor` is wrapped by ``torch.func`` (vmap, grad, ...): sizes and state may not depend on it."""
    return _functorch.is_functorch_wrapped_tensor(tensor)
