"""Bytes that stay alive after a forward pass, found by liveness: nothing is asked of autograd."""

from __future__ import annotations

import gc
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
