"""What autograd is doing right now: the one place that asks it by names PyTorch does not promise to keep.

A test holds each of them to what is assumed here.
"""

from __future__ import annotations

from typing import Any

import torch

_autograd: Any = torch._C._autograd  # type: ignore[reportAttributeAccessIssue] - missing from the type stubs


def next_node_number() -> int:
    """Return the number that autograd will give to the next node which this thread makes."""
    return _autograd._get_sequence_nr()


def running_node() -> Any:
    """Return the node whose backward this thread runs, or None."""
    return torch._C._current_autograd_node()


def running_pass() -> int:
    """Return the number of the backward pass that this thread runs, or -1."""
    return torch._C._current_graph_task_id()


def has_saving_hooks() -> bool:
    """Tell whether hooks for saved tensors are active in this thread."""
    return _autograd._top_saved_tensors_default_hooks(True) is not None
