"""What a graph keeps alive: saved tensors on their way through it, and the storages behind them."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cheapgrad.cost._autograd_state import hooked_tensors, next_node_number

StorageKey = tuple[torch.device, int]

# Most tensors are of these classes, and have one storage.
_PLAIN = (Tensor, nn.Parameter)
_DENSE = torch.strided
# Where a reentrant checkpoint keeps the states of random generators.
_RANDOM_STATES = frozenset({"fwd_cpu_state", "fwd_device_states", "fwd_gpu_states"})


class Parcel:
    """A saved tensor on its way through the graph; it lives exactly as long as the graph needs it."""

    __slots__ = ("__weakref__", "origin", "tensor")

    def __init__(self, tensor: Tensor, origin: Any) -> None:
        self.tensor = _cut_off(tensor) if _may_be_output(tensor) else tensor
        self.origin = origin


def _may_be_output(tensor: Tensor) -> bool:
    """Tell whether a tensor may come from the very node that saves it; held as it is, it would hold that node."""
    node = tensor.grad_fn
    if node is None:
        return False
    # Custom functions may make other nodes before they save.
    return isinstance(node, BackwardCFunction) or node._sequence_nr() == next_node_number() - 1


def _cut_off(tensor: Tensor) -> Tensor:
    """Return the tensor without its node."""
    if type(tensor) is not Tensor:
        return tensor.detach()
    # Past the modes that watch operations: this is none of the model's, and they take their time.
    with torch._C._DisableTorchDispatch():
        return tensor.detach()


class ParcelPost:
    """A pair of saved-tensor hooks that can tell at any time which saved tensors are still needed.

    Args:
        describe: called for every tensor that is saved; its answer is the parcel's origin.
    """

    def __init__(self, describe: Callable[[Tensor], Any] = lambda tensor: None) -> None:
        self._describe = describe
        self._sent: list[weakref.ref[Parcel]] = []

    def pack(self, tensor: Tensor) -> Parcel:
        """Wrap a tensor that is being saved."""
        parcel = Parcel(tensor, self._describe(tensor))
        self._sent.append(weakref.ref(parcel))
        return parcel

    @staticmethod
    def unpack(parcel: Parcel) -> Tensor:
        """Hand a saved tensor over to the backward pass."""
        return parcel.tensor

    def alive(self) -> list[Parcel]:
        """Return what is still needed, in the order in which it was saved."""
        return [parcel for sent in self._sent if (parcel := sent()) is not None]


def foreign_parcels(node: Any) -> Iterator[tuple[Callable[[Any], Tensor], Any]]:
    """Yield what the hooks of others keep in the place of the tensors that a node saved, with the hook that unpacks."""
    for unpack, kept in hooked_tensors(node):
        if unpack is not ParcelPost.unpack:
            yield unpack, kept


def storage_key(storage: torch.UntypedStorage) -> StorageKey:
    """Return what tells two storages apart while both are alive."""
    device = storage.device
    # Storages without memory, such as those of fake tensors, all lie at address 0.
    address = 0 if device.type == "meta" else storage.data_ptr()
    return (device, address or storage._cdata)


def list_storages(tensor: Tensor) -> Iterable[torch.UntypedStorage]:
    """Return the storages behind a tensor: one if it is strided, one per component if it is sparse or a wrapper."""
    if type(tensor) in _PLAIN and tensor.layout is _DENSE:
        return (tensor.untyped_storage(),)
    return _list_storages_of_parts(tensor)


def _list_storages_of_parts(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    if is_traceable_wrapper_subclass(tensor):
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        for part in parts:
            # A distributed tensor counts its mesh among its parts.
            if isinstance(part, Tensor):
                yield from list_storages(part)
    elif tensor.layout is torch.strided:
        yield tensor.untyped_storage()
    elif tensor.layout is torch.sparse_coo:
        yield tensor._indices().untyped_storage()
        yield tensor._values().untyped_storage()
    elif tensor.layout in {torch.sparse_csr, torch.sparse_bsr, torch.sparse_csc, torch.sparse_bsc}:
        by_row = tensor.layout in {torch.sparse_csr, torch.sparse_bsr}
        for part in (
            tensor.crow_indices() if by_row else tensor.ccol_indices(),
            tensor.col_indices() if by_row else tensor.row_indices(),
            tensor.values(),
        ):
            yield part.untyped_storage()


def key_storages(tensors: Iterable[Tensor]) -> set[StorageKey]:
    """Return the keys of all storages behind the tensors."""
    return {storage_key(storage) for tensor in tensors for storage in list_storages(tensor)}


def list_owned_tensors(items: Iterable[nn.Module | Tensor]) -> list[Tensor]:
    """Return the parameters and buffers of modules, and the tensors themselves; shared ones more than once."""
    owned: list[Tensor] = []
    for item in items:
        if isinstance(item, nn.Module):
            # Much faster than by name, which checks and spells every one of them.
            for module in item.modules():
                owned += [tensor for tensor in module._parameters.values() if tensor is not None]
                owned += [tensor for tensor in module._buffers.values() if tensor is not None]
        else:
            owned.append(item)
    return owned


def walk_graph(result: object) -> Iterator[Any]:
    """Yield the autograd nodes behind the tensors in `result`, each once."""
    waiting = [tensor.grad_fn for tensor in list_tensors(result) if tensor.grad_fn is not None]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions if following is not None]


def hidden_tensors(node: Any) -> Iterator[Tensor]:
    """Yield the tensors that a custom autograd node keeps as plain attributes, out of sight of the hooks."""
    # Only nodes of custom functions have a dictionary: it is their context.
    kept = getattr(node, "__dict__", {})
    if node.name() == "CheckpointFunctionBackward":
        # A checkpoint that is not reentrant keeps the states of random generators as well, where nobody sees them.
        kept = {name: value for name, value in kept.items() if name not in _RANDOM_STATES}
    return list_tensors(kept, into_dataclasses=False)


def list_tensors(value: object, *, into_dataclasses: bool = True) -> Iterator[Tensor]:
    """Yield the tensors in a value built of tuples, lists, mappings and, if asked for, dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from list_tensors(item, into_dataclasses=into_dataclasses)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from list_tensors(item, into_dataclasses=into_dataclasses)
    elif into_dataclasses and dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from list_tensors(getattr(value, field.name))


def describe_tensors(value: object) -> str:
    """Return dtypes, shapes and devices of the tensors in a value, for messages."""
    texts = [
        f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"
        for tensor in list_tensors(value)
    ]
    return ", ".join(texts) or "no tensors"
