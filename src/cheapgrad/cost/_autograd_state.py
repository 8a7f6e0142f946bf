"""What autograd is doing right now: the one place that asks it by names PyTorch does not promise to keep.

A test holds each of them to what is assumed here.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint

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


def saving_hooks() -> Any:
    """Return the pair of hooks for saved tensors that is active in this thread, or None."""
    return _autograd._top_saved_tensors_default_hooks(True)


_APPLY_CODE = torch.autograd.Function.apply.__func__.__code__  # type: ignore[reportFunctionMemberAccess] - a classmethod


def in_custom_function() -> bool:
    """Tell whether this thread is inside the forward of an `autograd.Function`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _APPLY_CODE:
            return True
        frame = frame.f_back
    return False


def is_checkpoint_code(frame: FrameType) -> bool:
    """Tell whether a frame runs code of torch's checkpoints."""
    return frame.f_code.co_filename == checkpoint.__file__


def hooked_tensors(node: Any) -> Iterator[tuple[Callable[[Any], Tensor], Any]]:
    """Yield, for each tensor that an autograd node saved under hooks, the hook that unpacks it and what is kept."""
    for name in _saved_names(type(node)):
        saved = getattr(node, name)
        for one in saved if isinstance(saved, (tuple, list)) else (saved,):
            unpack = one.unpack_hook
            if unpack is not None:
                yield unpack, one.data


@functools.cache
def _saved_names(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved"))


def is_checkpoint_hook(unpack: Callable[[Any], Tensor]) -> bool:
    """Tell whether a hook is that of a checkpoint, which keeps nothing of what is saved inside it."""
    return getattr(unpack, "__module__", None) == checkpoint.__name__


def is_selective(unpack: Callable[[Any], Tensor]) -> bool:
    """Tell whether the checkpoint of a hook was given contexts, in which it may keep what it likes."""
    rerun = _read_closure(unpack, "frame").recompute_fn
    return not isinstance(_read_closure(rerun, "recompute_context"), contextlib.nullcontext)


def _read_closure(function: Any, name: str) -> Any:
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents
