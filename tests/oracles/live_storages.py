"""Bytes that stay alive after a forward pass, found by liveness: nothing is asked of autograd."""

from __future__ import annotations

import gc
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cheapgrad.cost import measure_held_bytes


class LiveStorages(TorchDispatchMode):
    """Remembers every storage that an operation returned, as long as somebody holds it."""

    def __init__(self):
        super().__init__()
        self._sizes = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._sizes[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
        return out

    def live_bytes(self, *, without):
        """Sum up what is alive, leaving out the storages of some tensors."""
        gc.collect()
        left_out = {tensor.untyped_storage().data_ptr() for tensor in without}
        return sum(size for storage, size in self._sizes.items() if storage.data_ptr() not in left_out)


def assert_nothing_is_uncounted(model, x, compute_loss):
    """Compare what a loss holds by count with what is alive, before its backward pass and after it."""
    # The second step is like all that follow.
    compute_loss().backward()
    held = measure_held_bytes(compute_loss, exclude=[model, x]).total_bytes
    watch = LiveStorages()
    with watch:
        loss = compute_loss()
    alive = watch.live_bytes(without=[x, *model.parameters()])
    # The loss itself and other single numbers.
    assert held <= alive <= held + 256, (held, alive)
    loss.backward()
    del loss
    assert watch.live_bytes(without=[x, *model.parameters(), *(p.grad for p in model.parameters())]) <= 256
