"""Tensors that other operations would keep although a chain can compute them again: q, k and v of attention.

Attention is not linear in its queries, keys and values: rounding them would be a bias. They are the output of a linear
layer, and what that layer was computed from is held anyway. While a model runs forward inside a `RebuildScope`, what an
operation saves of such an output, or of a view of it, is replaced by the way to compute it again, exactly.
"""

from __future__ import annotations

import collections
import contextvars
import dataclasses
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import _autograd  # type: ignore[attr-defined] - private, and the only way to see the hooks around
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from cheapgrad.errors import OverwrittenError
from cheapgrad.sketch.transforms import is_inside_transform

# A gated feed-forward reads two outputs before it multiplies them.
_REMEMBERED = 2

# The scope of the forward pass that is running.
_current: contextvars.ContextVar[RebuildScope | None] = contextvars.ContextVar("current", default=None)


@dataclass(frozen=True)
class Source:
    """What an output is computed from.

    Attributes:
        root: the tensor that is held for it.
        parameters: what else is read, held by the model.
        compute: ``(root) -> output``.
        note_kept: called when the root was held for it and is read.
    """

    root: Tensor
    parameters: tuple[Tensor, ...]
    compute: Callable[[Tensor], Tensor]
    note_kept: Callable[[], None]


class _Recipe:
    """How to compute one output again, and which of its views are wanted."""

    def __init__(self, source: Source, output: Tensor, scope: RebuildScope) -> None:
        self._source = source
        self._storage = StorageWeakRef(output.untyped_storage())
        self._version = output._version
        self._parameter_versions = [parameter._version for parameter in source.parameters]
        self._scope = scope
        self._held_root: Any = None
        self._packed = self._unpacked = 0
        self._rebuilt: Tensor | None = output.detach()

    def forget(self) -> None:
        """Let go of the output: from now on it is computed again."""
        self._rebuilt = None

    def makes(self, tensor: Tensor) -> bool:
        """Tell whether a tensor at the same address is a view of the output, and not of a later tensor in its place."""
        return not self._storage.expired() and tensor._version == self._version

    def pack(self, view: Tensor) -> _PackedView:
        """Return what stands for a view of the output."""
        if not self._packed:
            # Through the hooks around ours, so that a checkpoint or an offload sees what is really held.
            self._held_root = self._scope.hold(self._source.root.detach())
            self._source = dataclasses.replace(self._source, root=self._source.root.new_empty(0))
        self._packed += 1
        return _PackedView(self, view.size(), view.stride(), int(view.storage_offset()))

    def unpack(self, packed: _PackedView) -> Tensor:
        """Return the view; the output is computed once for all of its views."""
        if self._scope.remembers(self) and self._rebuilt is not None:
            return self._rebuilt.as_strided(packed.size, packed.stride, packed.offset)
        if self._rebuilt is None:
            self._rebuilt = self._compute()
        view = self._rebuilt.as_strided(packed.size, packed.stride, packed.offset)
        self._unpacked += 1
        if self._unpacked % self._packed == 0:
            self._rebuilt = None
        return view

    def _compute(self) -> Tensor:
        if [parameter._version for parameter in self._source.parameters] != self._parameter_versions:
            raise OverwrittenError(
                "a parameter was overwritten between forward and backward, but what attention saved is to be computed "
                "from it again (recompute=True); run backward before the optimizer's step"
            )
        # A checkpoint compares what two passes save: nothing may change between them.
        if not self._scope.is_nested:
            self._source.note_kept()
        with torch.no_grad():
            return self._source.compute(self._scope.release(self._held_root))


@dataclass(frozen=True)
class _PackedView:
    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class RebuildScope:
    """The time in which outputs are registered and what operations save is looked up among them."""

    def __init__(self) -> None:
        self._outer = _autograd._top_saved_tensors_default_hooks(True)
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._recipes: dict[int, _Recipe] = {}
        # Looked at by the next linear layer, if an activation was called in between as a function.
        self._recent: collections.deque[_Recipe] = collections.deque()
        self._token: Any = None
        self._at_end: list[weakref.WeakMethod[Callable[[], None]]] = []

    @property
    def outer_hooks(self) -> Any:
        """The hooks around this scope, or None."""
        return self._outer

    @property
    def is_nested(self) -> bool:
        """Whether somebody else's hooks are around this scope."""
        return self._outer is not None

    @property
    def is_innermost(self) -> bool:
        """Whether what operations save here comes to this scope first."""
        hooks = _autograd._top_saved_tensors_default_hooks(True)
        return hooks is not None and hooks[0] == self._pack

    def enter(self) -> None:
        """Start looking."""
        self._token = _current.set(self)
        self._hooks.__enter__()

    def leave(self) -> None:
        """Stop looking, and forget the outputs."""
        self._hooks.__exit__()
        self._recipes = {}
        for recipe in self._recent:
            recipe.forget()
        self._recent.clear()
        _current.reset(self._token)
        for reference in self._at_end:
            callback = reference()
            if callback is not None:
                callback()
        self._at_end.clear()

    def call_at_end(self, callback: Callable[[], None]) -> None:
        """Call a bound method when the scope is left, if its object still lives."""
        self._at_end.append(weakref.WeakMethod(callback))

    def register(self, output: Tensor, source: Source) -> None:
        """Let operations that save `output` keep its source instead."""
        recipe = _Recipe(source, output, self)
        self._recipes[output.untyped_storage().data_ptr()] = recipe
        self._recent.append(recipe)
        if len(self._recent) > _REMEMBERED:
            self._recent.popleft().forget()

    def remembers(self, recipe: _Recipe) -> bool:
        """Tell whether the output of a recipe is still held."""
        return recipe in self._recent

    def hold(self, tensor: Tensor) -> Any:
        """Return what the hooks around this scope keep for a tensor."""
        return tensor if self._outer is None else self._outer[0](tensor)

    def release(self, held: Any) -> Tensor:
        """Return the tensor that `hold` was given."""
        return held if self._outer is None else self._outer[1](held)

    def _pack(self, tensor: Tensor) -> Any:
        if tensor.layout is torch.strided and self._recipes:
            recipe = self._recipes.get(tensor.untyped_storage().data_ptr())
            if recipe is not None and recipe.makes(tensor):
                return recipe.pack(tensor)
        return self.hold(tensor)

    def _unpack(self, held: Any) -> Tensor:
        return held.recipe.unpack(held) if isinstance(held, _PackedView) else self.release(held)


def may_rebuild() -> bool:
    """Tell whether saved tensors can be replaced here: not in compiled graphs, nor inside torch.func transforms."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and not is_inside_transform()


def current_scope() -> RebuildScope | None:
    """Return the scope of the forward pass that is running, or None.

    Inside somebody else's hooks, such as those of a checkpoint around one block, there is none: the block will be run
    again without its model around it, and has to save the same tensors then.
    """
    scope = None if torch.compiler.is_compiling() else _current.get()
    return scope if scope is not None and scope.is_innermost else None
