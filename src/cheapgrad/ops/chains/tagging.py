"""Products that compiled graphs compute again in backward instead of keeping them.

The compiler decides which tensors forward keeps for backward, and never forms a product twice unless the product is
tagged, as those inside a checkpoint are.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch._C import _autograd  # type: ignore[attr-defined] - private, and the only way to see the hooks around
from torch.utils.checkpoint import CheckpointPolicy

_KEY = "recompute"


def may_tag() -> bool:
    """Tell whether a graph is being traced in which products can be tagged: not inside a checkpoint, which tags all."""
    return (
        torch.compiler.is_compiling()
        and not torch.compiler.is_dynamo_compiling()
        and torch.is_grad_enabled()
        and _autograd._top_saved_tensors_default_hooks(True) is None
    )


class Tag:
    """The operations that were traced inside `tagging`, until the tag is taken off."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []

    def put_on(self, nodes: list[Any]) -> None:
        """Let nodes of the traced graph be computed again in backward."""
        self._nodes = nodes
        for node in nodes:
            node.meta[_KEY] = CheckpointPolicy.PREFER_RECOMPUTE

    def take_off(self) -> None:
        """Leave it to the compiler what is kept."""
        for node in self._nodes:
            node.meta.pop(_KEY, None)
        self._nodes = []


@contextlib.contextmanager
def tagging(tag: Tag | None) -> Iterator[None]:
    """Tag what is traced inside.

    Args:
        tag: remembers what was tagged; None tags nothing.
    """
    if tag is None:
        yield
        return
    # Imports the compiler, which runs here anyway.
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    if mode is None:
        # An earlier pass, which only looks at shapes.
        yield
        return
    graph = mode.tracer.graph
    before = len(graph.nodes)
    yield
    tag.put_on(list(itertools.islice(reversed(graph.nodes), len(graph.nodes) - before)))
