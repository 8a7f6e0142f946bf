"""The plain name of a function of torch, whichever of its aliases was called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.overrides import resolve_name


def torch_name(function: Callable[..., Any]) -> str:
    """Return ``"relu"`` for `torch.relu`, `torch.Tensor.relu` and `torch.nn.functional.relu`; ``""`` for foreigners."""
    qualified = resolve_name(function) or ""
    return qualified.rsplit(".", 1)[-1] if qualified.startswith("torch.") else ""
