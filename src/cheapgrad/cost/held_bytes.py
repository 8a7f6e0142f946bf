"""Bytes that a forward pass leaves held for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from cheapgrad.cost._preparation import check_callable
from cheapgrad.cost._saved_tensors import (
    ParcelPost,
    StorageKey,
    foreign_parcels,
    hidden_tensors,
    key_storages,
    list_owned_tensors,
    list_storages,
    list_tensors,
    storage_key,
    walk_graph,
)
from cheapgrad.errors import ForwardResultError


@dataclass(frozen=True)
class HeldStorage:
    """One block of memory that the graph keeps alive until backward.

    Attributes:
        storage_bytes: size of the whole storage in bytes, also where only a view of it was saved.
        shape: shape of the first tensor that was saved from it.
        dtype: dtype of that tensor, such as ``"float32"``.
        references: how many saved tensors live in this storage.
        hidden: whether it is held only where our saved-tensor hooks cannot see it: by an attribute of an autograd node,
            or by hooks of the function's own.
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
        marked ``hidden``; tensors inside foreign objects on such a context are not seen, and the states of random
        generators that checkpoints keep (5 kB each on the CPU) are left out. It is not peak memory: temporaries of the
        forward and backward passes are not in it.

    Raises:
        ArgumentError: `function` is no function, such as a loss that is computed already.
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
    check_callable("function", function, "write e.g. lambda: loss_function(model(x), y)")
    post = ParcelPost()
    with saved_tensors_hooks(post.pack, post.unpack):
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
    visible = [parcel.tensor for parcel in post.alive()]
    hidden: list[Tensor] = []
    for node in walk_graph(result):
        hidden += hidden_tensors(node)
        hidden += [tensor for _, kept in foreign_parcels(node) for tensor in list_tensors(kept)]
    return _count(visible, hidden, key_storages(list_owned_tensors(exclude)))


def _count(visible: list[Tensor], hidden: list[Tensor], excluded_keys: set[StorageKey]) -> HeldBytes:
    """Count each storage once, first come first described."""
    sizes: dict[StorageKey, int] = {}
    holders: dict[StorageKey, list[tuple[Tensor, bool]]] = {}
    for tensor, is_hidden in [(t, False) for t in visible] + [(t, True) for t in hidden]:
        for storage in list_storages(tensor):
            key = storage_key(storage)
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
