"""The most memory that a step needs at once."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cheapgrad.cost._preparation import check_callable
from cheapgrad.cost._saved_tensors import StorageKey, list_storages, list_tensors, storage_key


@dataclass(frozen=True)
class PeakMemory:
    """The most memory a step needed at once, beyond what was live when it began; see `peak_memory`.

    Attributes:
        peak_bytes: the largest number of bytes.
        source: ``"allocator"``: what PyTorch's allocator of the device gave out; ``"tracked"``: the storages of all
            tensors that operations returned, while they were alive.
        device: such as ``"cpu"`` or ``"cuda:0"``.
    """

    peak_bytes: int
    source: Literal["allocator", "tracked"]
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Return the record as data that JSON can hold."""
        return dataclasses.asdict(self)


def peak_memory(step: Callable[[], object], *, device: torch.device | str | None = None) -> PeakMemory:
    """Run a step once and measure the most memory it needs at once, beyond what is live when it begins.

    That is what decides whether a step fits. Bytes held for backward (`measure_held_bytes`, `scan`) are a part of it:
    the peak also has the gradients, the temporaries of both passes and whatever else the step makes.

    Args:
        step: no arguments; forward, backward, and the optimizer's step if it is to be part of the peak.
        device: whose memory; by default the current GPU if this process has used one, otherwise the CPU.

    Returns:
        The peak, and how it was measured.

    Law:
        On a GPU it is the allocator's own count: exact, rounding of block sizes included. On the CPU it is the sum over
        the storages that operations have returned and that are still alive, each counted once: the buffers that a
        kernel makes and drops while it runs are not in it, and memory that was live before the step and is freed during
        it is not taken off. What a step leaves behind (gradients, the state of an optimizer) is in the peak of the run
        that makes it, and live before the next.

    Raises:
        ArgumentError: `step` is no function, such as a loss that is computed already.

    Example:
        >>> import torch
        >>> peak_memory(lambda: torch.ones(1000).exp().sum()).peak_bytes
        8000
    """
    check_callable("step", step, "write e.g. lambda: loss_function(model(x), y).backward()")
    place = _choose_device(device)
    if place.type == "cuda":
        return _measure_allocator(step, place)
    tracker = _LiveBytes(place.type)
    with tracker:
        step()
    return PeakMemory(tracker.peak_bytes, "tracked", str(place))


def _choose_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        uses_gpu = torch.cuda.is_available() and torch.cuda.is_initialized() and torch.cuda.memory_allocated() > 0
        device = "cuda" if uses_gpu else "cpu"
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return place


def _measure_allocator(step: Callable[[], object], place: torch.device) -> PeakMemory:
    torch.cuda.synchronize(place)
    before = torch.cuda.memory_allocated(place)
    torch.cuda.reset_peak_memory_stats(place)
    step()
    torch.cuda.synchronize(place)
    return PeakMemory(torch.cuda.max_memory_allocated(place) - before, "allocator", str(place))


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations return, and takes them off when they are freed."""

    supports_higher_order_operators = True

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._device_type = device_type
        self._live_bytes = 0
        self._known: set[StorageKey] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it returned."""
        # What goes in is not the step's making, unless it is known already.
        foreign = {storage_key(storage) for tensor in list_tensors((args, kwargs)) for storage in list_storages(tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in list_tensors(out):
            for storage in list_storages(tensor):
                self._take_in(storage, foreign)
        return out

    def _take_in(self, storage: torch.UntypedStorage, foreign: set[StorageKey]) -> None:
        key = storage_key(storage)
        if key in self._known or key in foreign or storage.device.type != self._device_type:
            return
        self._known.add(key)
        count = storage.nbytes()
        self._live_bytes += count
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        weakref.finalize(storage, self._let_go, key, count)

    def _let_go(self, key: StorageKey, count: int) -> None:
        self._known.discard(key)
        self._live_bytes -= count
