"""Whether a model still is what a graph was made of."""

from __future__ import annotations

from torch import Tensor, nn

from cheapgrad.errors import StaleGraphError


class Snapshot:
    """All parameters and buffers of a model as they are now: which tensors, their memory, and how often changed."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._marks = {name: (tensor, *_mark(tensor)) for name, tensor in _list_tensors(model)}

    def check(self) -> None:
        """Raise `StaleGraphError` if a tensor was changed in place, replaced, added or removed."""
        now = dict(_list_tensors(self._model))
        changed = [
            name
            for name in sorted(now.keys() | self._marks.keys())
            if name not in now or name not in self._marks or not _is_same(now[name], self._marks[name])
        ]
        if changed:
            raise StaleGraphError(
                f"{len(changed)} parameters or buffers have changed since linearized() was called, first "
                f"{changed[0]!r}, so its graph no longer holds; call linearized() again"
            )


def _list_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _mark(tensor: Tensor) -> tuple[int, int]:
    # Tensors made in inference mode do not count changes.
    return -1 if tensor.is_inference() else tensor._version, tensor.data_ptr()


def _is_same(tensor: Tensor, mark: tuple[Tensor, int, int]) -> bool:
    return tensor is mark[0] and _mark(tensor) == mark[1:]
