"""The ledger while it is being written: every operation that runs, and every tensor that is saved."""

from __future__ import annotations

import functools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from cheapgrad.cost._autograd_state import (
    in_custom_function,
    is_checkpoint_code,
    is_checkpoint_hook,
    is_selective,
    next_node_number,
    running_node,
)
from cheapgrad.cost._module_tracker import ModuleTracker, Path
from cheapgrad.cost._operation_kinds import has_arithmetic, is_per_element
from cheapgrad.cost._saved_tensors import (
    ParcelPost,
    StorageKey,
    foreign_parcels,
    hidden_tensors,
    list_storages,
    list_tensors,
    storage_key,
    walk_graph,
)
from cheapgrad.cost.formulas import Formula, count_flops, find_formula, operation_name

Phase = Literal["forward", "backward", "recompute"]

# Who holds what no operation of the output's graph saved: checkpoints, and graphs that do not lead to the output.
CHECKPOINT = "(checkpoint)"
ELSEWHERE = "(elsewhere)"


class _Kind(NamedTuple):
    """What is known of an operation: its formula, or whether it is made of others that are counted in its place."""

    name: str
    formula: Formula | None
    is_composite: bool


class _Saver(NamedTuple):
    """Who saved a tensor: the modules that were running, and the number of the autograd node behind the next one."""

    path: Path
    number: int
    is_parameter: bool = False
    is_checkpoint: bool = False


@dataclass(frozen=True)
class Entry:
    """One line of the ledger.

    Attributes:
        path: the modules that were running.
        operation: its name.
        phase: when it ran.
        calls: how often.
        flops: in all calls.
    """

    path: Path
    operation: str
    phase: Phase
    calls: int
    flops: int


class Ledger(TorchDispatchMode):
    """Counts the FLOPs of all operations while it is active, and notes who saves what for backward.

    Args:
        tracker: knows which module runs.
        fake: whether fake tensors are what is measured, or somebody's trial.
    """

    # Attention with a score function reaches a mode as an operator of higher order.
    supports_higher_order_operators = True

    def __init__(self, tracker: ModuleTracker, *, fake: bool) -> None:
        super().__init__()
        self.tracker = tracker
        self._fake = fake
        self.post = ParcelPost(self._describe_saver)
        self.uncounted: dict[str, bool] = {}
        self._kinds: dict[int, _Kind] = {}
        # FLOPs and calls, by path, phase, name, and the number of the custom function's node they may belong to.
        self._sums: defaultdict[tuple[Path, Phase, str, int | None], list[int]] = defaultdict(lambda: [0, 0])
        # Names of the nodes of the graph, by their numbers.
        self._nodes: dict[int, str] = {}
        self._custom: set[int] = set()
        # Whether hooks of the model's own kept something, and whether checkpoints were given contexts.
        self.has_foreign_hooks = False
        self.has_selective_checkpoints = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # A scan runs eagerly: the compiler has not to be told, call by call, to leave the handler alone.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        if types and any(map(_is_wrapper, types)):
            # A tensor made of tensors: what it does with its parts comes here by itself.
            return NotImplemented
        kwargs = kwargs or {}
        if types and not self._fake and FakeTensor in types:
            # Distributed tensors find out the shapes of their results that way.
            return func(*args, **kwargs)
        # By identity, because operations are slow to hash; they live as long as PyTorch's table of them.
        kind = self._kinds.get(id(func)) or self._classify(func)
        if kind.is_composite:
            # They come here whole only where autograd is out of the way, such as in inference mode.
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        # Nodes are made where gradients are on, so that there the tracker has to know of every operation.
        if self.tracker.in_backward and torch.is_grad_enabled():
            self.tracker.note_recomputation()
        if kind.formula is not None:
            self._count(kind.name, count_flops(func, kind.formula, args, kwargs, out))
        return out

    def _classify(self, func: Any) -> _Kind:
        formula = find_formula(func)
        kind = _Kind(operation_name(func), formula, formula is None and _is_composite(func))
        if formula is None and not kind.is_composite:
            if isinstance(func, HigherOrderOperator):
                self.uncounted[kind.name] = False
            elif has_arithmetic(func):
                self.uncounted[kind.name] = is_per_element(func)
        self._kinds[id(func)] = kind
        return kind

    def _count(self, name: str, flops: int) -> None:
        tracker = self.tracker
        number = None
        if not tracker.in_backward:
            key_phase: Phase = "forward"
            path = tracker.path()
            if not torch.is_grad_enabled() and in_custom_function():
                # Its node is the last one made.
                number = next_node_number() - 1
        elif tracker.is_recomputing():
            key_phase, path = "recompute", tracker.path()
        else:
            node = running_node()
            key_phase = "backward"
            path = () if node is None else tracker.owner(node)
            name = name if node is None else node.name()
        sums = self._sums[path, key_phase, name, number]
        sums[0] += flops
        sums[1] += 1

    def _describe_saver(self, tensor: Tensor) -> _Saver:
        base = tensor._base if tensor._is_view() else tensor
        # Called by the hook, which is called by whoever saves.
        is_checkpoint = is_checkpoint_code(sys._getframe(2))
        number = next_node_number() - 1
        return _Saver(self.tracker.path(), number, isinstance(base, nn.Parameter), is_checkpoint)

    def end_forward(self, result: object, owned: set[StorageKey]) -> tuple[list[tuple[Path, str, int]], list[Tensor]]:
        """Take stock of what is held, and get ready for backward.

        Args:
            result: the forward pass's outputs; the graph behind them is walked.
            owned: keys of storages that exist anyway: parameters and buffers.

        Returns:
            The storages that are held, as (path, operation, bytes), and the leaves that will get a gradient.
        """
        # Strong references until the count is over: a freed storage's address may be given out again.
        parcels = self.post.alive()
        # All that a node saves, it saves under the same hooks.
        ours = {parcel.origin.number for parcel in parcels if not parcel.origin.is_checkpoint}
        leaves: list[Tensor] = []
        hidden: list[tuple[Tensor, _Saver]] = []
        for node in walk_graph(result):
            variable = getattr(node, "variable", None)
            if variable is not None:
                leaves.append(variable)
                continue
            number, name = node._sequence_nr(), node.name()
            self._nodes[number] = name
            out_of_sight = [] if number in ours else self._list_foreign(node)
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                # What runs inside of a reentrant checkpoint has names of its own, in its backward pass as well.
                if name != "CheckpointFunctionBackward":
                    self._custom.add(number)
                out_of_sight += hidden_tensors(node)
            if out_of_sight:
                saver = _Saver(self.tracker.owner(node), number)
                hidden += [(tensor, saver) for tensor in out_of_sight]
        held = [(parcel.tensor, parcel.origin) for parcel in parcels] + hidden
        savings = self._assign_storages(held, owned)
        self.tracker.start_backward(
            sorted({(saver.number + 1, saver.path) for _, saver in held if saver.is_checkpoint})
        )
        return savings, leaves

    def _list_foreign(self, node: Any) -> list[Tensor]:
        """Return the tensors that hooks of the model's own keep in the place of what a node saved."""
        tensors: list[Tensor] = []
        for unpack, kept in foreign_parcels(node):
            if is_checkpoint_hook(unpack):
                self.has_selective_checkpoints = self.has_selective_checkpoints or is_selective(unpack)
            else:
                self.has_foreign_hooks = True
                tensors += list_tensors(kept)
        return tensors

    def _assign_storages(
        self, held: Iterable[tuple[Tensor, _Saver]], owned: set[StorageKey]
    ) -> list[tuple[Path, str, int]]:
        """Give every storage to the first that saved it."""
        seen = set(owned)
        savings = []
        held = list(held)
        for tensor, saver in held:
            if saver.is_parameter:
                seen.update(storage_key(storage) for storage in list_storages(tensor))
        for tensor, saver in held:
            for storage in list_storages(tensor):
                key = storage_key(storage)
                if key in seen or storage.nbytes() == 0:
                    continue
                seen.add(key)
                name = CHECKPOINT if saver.is_checkpoint else self._nodes.get(saver.number, ELSEWHERE)
                savings.append((saver.path, name, storage.nbytes()))
        return savings

    def entries(self) -> list[Entry]:
        """Return the ledger's lines, with the operations of the forward pass as names everywhere."""
        label = self.labels()
        entries = []
        for (path, phase, name, number), (flops, calls) in self._sums.items():
            if number in self._custom and number is not None:
                name = label(self._nodes[number])
            elif phase == "backward":
                name = label(name)
            entries.append(Entry(path, name, phase, calls, flops))
        return entries

    def has_run(self, name: str) -> bool:
        """Tell whether an operation ran."""
        return any(kind.name == name for kind in self._kinds.values())

    def labels(self) -> Callable[[str], str]:
        """Return a function from the name of an autograd node to that of the operation that made it."""
        operations = {_collapse(kind.name.removeprefix("aten::")): kind.name for kind in self._kinds.values()}

        @functools.cache
        def label(name: str) -> str:
            bare = name.rstrip("0123456789").removesuffix("Backward")
            generated = bare.removeprefix("GeneratedBackwardFor_").removesuffix("_default")
            return operations.get(_collapse(generated), bare)

        return label


@functools.cache
def _is_composite(operation: Any) -> bool:
    """Tell an operation that PyTorch defines by others."""
    if isinstance(operation, HigherOrderOperator) or operation is torch.ops.prim.device.default:
        return False
    return operation._can_decompose()


@functools.cache
def _is_wrapper(kind: type) -> bool:
    """Tell a class of tensors that are made of tensors and do operations on them."""
    is_plain = kind.__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl
    return not is_plain and not issubclass(kind, FakeTensor)


def _collapse(name: str) -> str:
    return name.replace("_", "").replace(":", "").lower()
