"""Bytes that a forward pass leaves held for its backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from cheapgrad.errors import ForwardResultError


@dataclass(frozen=True)
class HeldStorage:
    """One block of memory that the graph keeps alive until backward.

    Attributes:
        storage_bytes: size of the whole storage in bytes, also where only a view of it was saved.
        shape: shape of the first tensor that was saved from it.
        dtype: dtype of that tensor, such as ``"float32"``.
        references: how many saved tensors live in this storage.
        hidden: whether it is held only by an attribute of an autograd node, where saved-tensor hooks cannot see it.
    """

    storage_bytes: int
    shape: tuple[int, ...]
    dtype: str
    references: int
    hidden: bool


@dataclass(frozen=True)
class HeldBytes:
    """What a forward pass holds for its backward pass; see `measure_held_bytes`.

    Attributes:
        total_bytes: bytes of all storages held, each counted once, the excluded ones left out.
        excluded_bytes: bytes of held storages that belong to excluded modules or tensors (usually the parameters).
        storages: every storage counted in `total_bytes`, largest first.
    """

    total_bytes: int
    excluded_bytes: int
    storages: tuple[HeldStorage, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain lists and numbers, ready for JSON."""
        return asdict(self)


class _Parcel:
    """A saved tensor on its way through the graph; it lives exactly as long as the graph needs it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        # Detached, because a parcel that held an output itself would form a reference cycle with its own graph.
        self.tensor = tensor.detach()


def measure_held_bytes(function: Callable[[], object], *, exclude: Iterable[nn.Module | Tensor] = ()) -> HeldBytes:
    r"""Run a forward pass once and count the bytes it leaves held for backward.

    With S the set of distinct storages that the graph of ``function()`` keeps alive when it returns, and E the storages
    of the excluded modules and tensors, the answer is ``Σ nbytes(s)`` over ``s ∈ S \ E``.

    Args:
        function: no arguments; runs the forward pass and returns its loss, or anything that keeps the graph alive.
        exclude: modules whose parameters and buffers, and tensors, that are not to be counted: they exist anyway.

    Returns:
        The total, and one `HeldStorage` for each storage, largest first.

    Law:
        Exact for what the graph holds at the end of ``function()``: a storage shared by several saved tensors counts
        once, a view counts as the whole storage it keeps alive, and what was saved by a branch that has since been
        dropped does not count. The inputs of the network count too, unless excluded. Tensors that a custom function
        keeps as attributes of its context, out of sight of saved-tensor hooks, are found by walking the graph and
        marked ``hidden``; tensors inside foreign objects on such a context are not seen. It is not peak memory:
        temporaries of the forward and backward passes are not in it.

    Raises:
        ForwardResultError: `function` returned None or a number, so that nothing keeps its graph alive.

    Example:
        A `Linear` holds its input; a `ReLU` holds its output, which is the next layer's input.

        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> rows_NI = torch.ones(32, 8)
        >>> held = measure_held_bytes(lambda: model(rows_NI).sum(), exclude=[model])
        >>> held.total_bytes == 32 * 8 * 4 + 32 * 16 * 4
        True
    """
    parcels: weakref.WeakSet[_Parcel] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Parcel:
        parcel = _Parcel(tensor)
        parcels.add(parcel)
        return parcel

    with saved_tensors_hooks(pack, lambda parcel: parcel.tensor):
        result = function()
    if result is None:
        raise ForwardResultError(
            "the function to measure returned None, so its graph is already gone; let it return the loss it computed"
        )
    if isinstance(result, (int, float)):
        raise ForwardResultError(
            f"the function to measure returned the number {result!r}, which holds no graph; let it return the loss "
            "itself, without .item()"
        )
    # Strong references to every tensor until the count is over: a freed storage's address may be given out again.
    visible = [parcel.tensor for parcel in list(parcels)]
    hidden = list(_hidden_tensors(result))
    return _count(visible, hidden, list(_tensors_to_exclude(exclude)))


def _count(visible: list[Tensor], hidden: list[Tensor], excluded: list[Tensor]) -> HeldBytes:
    """Count each storage once, first come first described."""
    excluded_keys = {_key(storage) for tensor in excluded for storage in _storages(tensor)}
    sizes: dict[tuple[str, int], int] = {}
    holders: dict[tuple[str, int], list[tuple[Tensor, bool]]] = {}
    for tensor, is_hidden in [(t, False) for t in visible] + [(t, True) for t in hidden]:
        for storage in _storages(tensor):
            key = _key(storage)
            sizes[key] = storage.nbytes()
            holders.setdefault(key, []).append((tensor, is_hidden))
    storages = [
        HeldStorage(
            storage_bytes=sizes[key],
            shape=tuple(found[0][0].shape),
            dtype=str(found[0][0].dtype).removeprefix("torch."),
            references=len(found),
            hidden=all(is_hidden for _, is_hidden in found),
        )
        for key, found in holders.items()
        if key not in excluded_keys and sizes[key] > 0
    ]
    storages.sort(key=lambda storage: (-storage.storage_bytes, storage.shape, storage.dtype))
    return HeldBytes(
        total_bytes=sum(storage.storage_bytes for storage in storages),
        excluded_bytes=sum(size for key, size in sizes.items() if key in excluded_keys),
        storages=tuple(storages),
    )


def _key(storage: torch.UntypedStorage) -> tuple[str, int]:
    return (str(storage.device), storage.data_ptr())


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """Yield the storages behind a tensor: one if it is strided, one per component if it is sparse."""
    if tensor.layout is torch.strided:
        yield tensor.untyped_storage()
    elif tensor.layout is torch.sparse_coo:
        yield tensor._indices().untyped_storage()
        yield tensor._values().untyped_storage()
    else:
        by_row = tensor.layout in {torch.sparse_csr, torch.sparse_bsr}
        for part in (
            tensor.crow_indices() if by_row else tensor.ccol_indices(),
            tensor.col_indices() if by_row else tensor.row_indices(),
            tensor.values(),
        ):
            yield part.untyped_storage()


def _tensors_to_exclude(exclude: Iterable[nn.Module | Tensor]) -> Iterator[Tensor]:
    for item in exclude:
        if isinstance(item, nn.Module):
            yield from item.parameters()
            yield from item.buffers()
        else:
            yield item


def _hidden_tensors(result: object) -> Iterator[Tensor]:
    """Yield the tensors that custom autograd nodes behind `result` keep as plain attributes."""
    waiting = [tensor.grad_fn for tensor in _tensors_in(result) if tensor.grad_fn is not None]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        # Only nodes of custom functions have a dictionary: it is their context.
        yield from _tensors_in(getattr(node, "__dict__", {}))
        waiting += [following for following, _ in node.next_functions if following is not None]


def _tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors in a value built of tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors_in(item)
