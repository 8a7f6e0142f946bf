"""Tensors that a chain passes over, and whether somebody asks to see their gradients.

The backward pass of a chain goes from its output to its root and never forms the gradients of the tensors between them.
Where somebody asks for one of those, the chain stops there and hands over; where it cannot, because nothing of what the
tensor was computed from is kept, he gets an error.
"""

from __future__ import annotations

import collections
import functools
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cheapgrad.errors import PassedOverError

_PASSED_OVER = (
    "a hook or retain_grad() was asked of an intermediate tensor of shape {shape} after the next layer had run, but "
    "codes have taken the place of what it was computed from, and the backward pass of a row-wise chain passes over "
    "it; ask before it is passed on, for instance in a forward hook, or run forward and backward under "
    "`with handle.exact():`"
)


def is_observed(x: Tensor) -> bool:
    """Tell whether somebody asked to see the gradient of `x`, so that no chain may pass it over."""
    return bool(x._backward_hooks) or x.retains_grad


class Watch:
    """Sees who asks for the gradient of a tensor, without keeping the tensor.

    Args:
        tensor: the output of a differentiable operation.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._shape = tuple(tensor.shape)
        # Held, because hooks live on when the tensor that they were registered on is gone.
        self._hooks = _hooks_of(tensor)

    @property
    def is_observed(self) -> bool:
        """Whether there is a hook on the tensor, or it retains its gradient."""
        tensor = self._tensor()
        return bool(self._hooks) or (tensor is not None and tensor.retains_grad)

    def refuse_if_observed(self) -> None:
        """Raise `PassedOverError` if somebody asked for the gradient of this tensor."""
        if self.is_observed:
            raise PassedOverError(_PASSED_OVER.format(shape=self._shape))

    def may_be_an_answer(self) -> bool:
        """Tell whether a backward pass that was asked for certain gradients may have been asked for this tensor's."""
        tensor = self._tensor()
        if tensor is None or tensor.grad_fn is None:
            return False
        if _is_run(tensor.grad_fn) and not any(_is_run(following) for following, _ in tensor.grad_fn.next_functions):
            return True
        del tensor
        return _is_held(self._tensor)


def is_asked_for(watches: Sequence[Watch], node: Any) -> bool:
    """Tell whether the running backward pass has to show somebody the gradient of one of these tensors.

    Args:
        watches: the tensors.
        node: the autograd node that is running.
    """
    if any(watch.is_observed for watch in watches):
        return True
    if torch.compiler.is_compiling():
        # A traced backward pass gives the gradients of what goes into the graph, of which no chain is part.
        return False
    return not _runs_to_leaves(node) and any(watch.may_be_an_answer() for watch in watches)


def _hooks_of(tensor: Tensor) -> dict[int, Any]:
    """Return the dictionary that holds the hooks of a tensor, made now if there are none yet."""
    if tensor._backward_hooks is None:
        tensor._backward_hooks = collections.OrderedDict()
        if tensor.grad_fn is not None:
            tensor.grad_fn._register_hook_dict(tensor)
    return tensor._backward_hooks


def _runs_to_leaves(node: Any) -> bool:
    """Tell whether the running backward pass is a plain ``backward()``, which gives leaves their gradients only."""
    leaves = [following for following, _ in node.next_functions if type(following).__name__ == "AccumulateGrad"]
    try:
        return any(torch._C._will_engine_execute_node(leaf) for leaf in leaves)
    except RuntimeError:
        # What PyTorch says of a leaf that `torch.autograd.grad` was asked for.
        return False


def _is_run(node: Any) -> bool:
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return True


def _is_held(reference: weakref.ref[Tensor]) -> bool:
    """Tell whether anybody in Python holds a tensor; yes for one that is alive where PyTorch does not show it."""
    return not _holders_can_be_counted() or _count_holders(reference) > 0


def _count_holders(reference: weakref.ref[Tensor]) -> int:
    tensor = reference()
    # Less this function's own two references, and that of whoever holds the tensor in C++, all of them together.
    if tensor is None:
        return 0
    return sys.getrefcount(tensor) - 2 - (tensor._use_count() > 1)  # type: ignore[attr-defined] - private


@functools.cache
def _holders_can_be_counted() -> bool:
    """Tell whether counting references tells a tensor that a variable holds from one that only a saved tensor is."""
    with torch.enable_grad():
        tensor = torch.ones((), requires_grad=True) * 1
        held_in_graph = torch.nn.functional.gelu(tensor)
    reference = weakref.ref(tensor)
    with_variable = _count_holders(reference)
    del tensor
    return held_in_graph.requires_grad and (with_variable, _count_holders(reference)) == (1, 0)
