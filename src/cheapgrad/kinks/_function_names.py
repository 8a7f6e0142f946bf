"""The plain name of a function of torch, whichever of its aliases was called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import resolve_name

# What hands a value over to Python, or cuts it off: what is made of it then, no mode sees.
_OUT_OF_SIGHT = frozenset(
    {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "is_nonzero", "equal", "allclose", "detach"}
)
# Of whole numbers or truth values, but not for what stands in the tensor.
_OF_FORM_ONLY = ("_like", "isnan", "isinf", "isfinite", "isposinf", "isneginf", "is_complex")


def torch_name(function: Callable[..., Any]) -> str:
    """Return ``"relu"`` for `torch.relu`, `torch.Tensor.relu` and `torch.nn.functional.relu`; ``""`` for foreigners."""
    qualified = resolve_name(function) or ""
    return qualified.rsplit(".", 1)[-1] if qualified.startswith("torch.") else ""


def may_choose(name: str, result: object) -> bool:
    """Tell whether a function of torch turned a value into something that a program may choose by unseen.

    Such are whole numbers and truth values that depend on a tensor's entries, numbers that Python gets to see, and
    values cut off from the graph.
    """
    if name in _OUT_OF_SIGHT:
        return True
    if not name or name.startswith("new_") or name.endswith(_OF_FORM_ONLY) or not isinstance(result, Tensor):
        return False
    return not (result.is_floating_point() or result.is_complex())
