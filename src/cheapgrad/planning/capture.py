"""One exact pass that writes down what every layer sees, who holds what, and which layers share their rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from cheapgrad.convert.kinds import LayerKind, LayerUse, kind_of
from cheapgrad.cost._saved_tensors import (
    ParcelPost,
    StorageKey,
    key_storages,
    list_owned_tensors,
    list_storages,
    storage_key,
)
from cheapgrad.ops.chains.activation_stage import ActivationStage
from cheapgrad.ops.chains.functional import read_activation, recognises
from cheapgrad.planning.passes import Step

#: Kinds of layers that are plain products of matrices.
MATRICES = ("Linear", "Conv1D")

# Stands for everything that is no layer of the plan.
_OTHERS = ""


@dataclass
class Call:
    """One call of a layer in the exact pass.

    Attributes:
        layer: its name.
        module: the layer.
        kind: its kind, which a converted module does not show.
        input: X.
        shape: sizes that costs are functions of.
        wants_input: whether the input needs a gradient.
        before: the call whose output this one's input was computed from row by row, or None.
        order: how many calls of the same layer came before.
        held: storages that only this layer's input needs, with their bytes, as far as other layers share them.
        activation: what stands between the two, with what autograd keeps of it, or None.
        bypassed: storages that only that activation needs, and this layer: a chain of codes lets them go.
        cotangent: G, once backward has run.
        input_gradient: dX of this call, or None.
        weight_factor: what the weight's gradient is multiplied by, see `Step.units`.
        bias_factor: the same of the bias.
    """

    layer: str
    module: nn.Module
    kind: LayerKind
    input: Tensor
    shape: Any
    wants_input: bool
    before: Call | None
    order: int = 0
    held: dict[StorageKey, int] = field(default_factory=dict)
    activation: tuple[ActivationStage, Tensor] | None = None
    bypassed: dict[StorageKey, int] = field(default_factory=dict)
    cotangent: Tensor | None = None
    input_gradient: Tensor | None = None
    weight_factor: float = 1.0
    bias_factor: float = 1.0

    @property
    def activated(self) -> bool:
        """Whether an activation stands between this call and the one before."""
        return self.activation is not None

    @property
    def is_matrix(self) -> bool:
        """Whether the layer is a plain product of matrices."""
        return self.kind.name in MATRICES

    @property
    def energy(self) -> float:
        """``Σ_n ‖x_n‖² ‖g_n‖²`` over rows, or examples of convolutions: noise of codes is near proportional to it."""
        pair = [
            (tensor.reshape(-1, tensor.shape[-1]) if self.is_matrix else tensor.flatten(1)).square().sum(1)
            for tensor in (self.input, self.use.cotangent)
        ]
        return float(pair[0].double() @ pair[1].double())

    @property
    def use(self) -> LayerUse:
        """The tensors of this call, as laws read them."""
        if self.cotangent is None:
            raise RuntimeError(f"no gradient reached {self.layer}")
        return LayerUse(self.input, self.cotangent, self.wants_input)


@dataclass
class Capture:
    """What one exact pass showed.

    Attributes:
        calls: of all layers, in the order in which they ran, those that a gradient reached.
        gradient: of all parameters.
        loss: of the batch.
    """

    calls: list[Call]
    gradient: list[Tensor]
    loss: float


class _Recorder:
    """Hooks on the layers of one pass."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = layers
        self.calls: list[Call] = []
        self.views: list[tuple[Call, Tensor]] = []
        self._makers: dict[Any, Call] = {}
        self._running: list[str] = []
        self.is_over = False
        self._counts: dict[str, int] = {}
        self._pending: list[tuple[Tensor, Tensor, Call | None, tuple[ActivationStage, Tensor] | None]] = []

    def describe(self, tensor: Tensor) -> tuple[str, int]:
        """Say which call saves a tensor."""
        return (self._running[-1] if self._running else _OTHERS, len(self.calls))

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the layers inside."""
        handles = []
        for name, module in self.layers.items():
            handles.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leaving(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Any:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.is_over:
                # A checkpoint runs its layers again in the backward pass.
                return None
            kind = kind_of(type(module))
            key = kind.input_name if kind is not None else "input"
            x = args[0] if args else kwargs[key]
            before, activation = self._find_maker(x)
            # A node of its own, so that what reaches it is the gradient of this call alone.
            view = x.view_as(x) if x.requires_grad else x
            self._running.append(name)
            self._pending.append((x, view, before, activation))
            return ((view, *args[1:]), kwargs) if args else (args, {**kwargs, key: view})

        return enter

    def _find_maker(self, x: Tensor) -> tuple[Call | None, tuple[ActivationStage, Tensor] | None]:
        node = x.grad_fn
        if node is None:
            return None, None
        if node in self._makers:
            return self._makers[node], None
        if not recognises(node):
            return None, None
        before = self._makers.get(node.next_functions[0][0])
        activation = None if before is None else read_activation(node)
        return (None if activation is None else before), activation

    def _leaving(self, name: str) -> Any:
        def leave(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self.is_over:
                return
            self._running.pop()
            x, view, before, activation = self._pending.pop()
            order = self._counts.get(name, 0)
            self._counts[name] = order + 1
            kind = kind_of(type(module))
            if kind is None or not output.requires_grad:
                return
            shape = kind.shape(module, x, output)
            call = Call(name, module, kind, x.detach(), shape, x.requires_grad, before, order, activation=activation)
            self.calls.append(call)
            if x.requires_grad:
                self.views.append((call, view))
            self._makers[output.grad_fn] = call
            output.register_hook(lambda grad: setattr(call, "cotangent", grad.detach()))

        return leave


def capture_pass(step: Step, layers: Mapping[str, nn.Module], batch: Any, *, finds_holders: bool = True) -> Capture:
    """Run one exact pass and write down what every layer sees.

    Args:
        step: the training step.
        layers: layers to watch, by name.
        batch: the batch.
        finds_holders: whether to find out who holds what, too.

    Returns:
        Every call of these layers with its tensors, and the gradient.
    """
    recorder = _Recorder(layers)
    post = ParcelPost(recorder.describe)

    def views() -> list[Tensor]:
        recorder.is_over = True
        if finds_holders:
            _share_out(post, recorder.calls, key_storages(list_owned_tensors([step.model])))
        return [view for _, view in recorder.views]

    watching = saved_tensors_hooks(post.pack, post.unpack) if finds_holders else contextlib.nullcontext()
    with recorder.attached(), watching:
        gradient, of_inputs = step.gradient(batch, views)
    for (call, _), value in zip(recorder.views, of_inputs, strict=True):
        call.input_gradient = value
    for call in recorder.calls:
        call.weight_factor = step.factor_of(getattr(call.module, "weight", None))
        call.bias_factor = step.factor_of(getattr(call.module, "bias", None))
    return Capture([call for call in recorder.calls if call.cotangent is not None], gradient, step.last_loss)


def _share_out(post: ParcelPost, calls: list[Call], owned: set[StorageKey]) -> None:
    """Tell every call which storages are held for its input, by no one but layers of the plan."""
    holders: dict[StorageKey, set[int]] = {}
    others: dict[StorageKey, int] = {}
    sizes: dict[StorageKey, int] = {}
    for parcel in post.alive():
        layer, position = parcel.origin
        # A layer that no gradient leaves makes no call.
        call = calls[position] if position < len(calls) and calls[position].layer == layer else None
        is_input = call is not None and _is_input(parcel.tensor, call)
        for storage in list_storages(parcel.tensor):
            key = storage_key(storage)
            if key in owned or not storage.nbytes():
                continue
            sizes[key] = storage.nbytes()
            if is_input:
                holders.setdefault(key, set()).add(position)
            else:
                others[key] = others.get(key, 0) + 1
    for key, positions in holders.items():
        if key not in others:
            for position in positions:
                calls[position].held[key] = sizes[key]
    for position, call in enumerate(calls):
        for key in set() if call.activation is None else key_storages([call.activation[1]]):
            if others.get(key) == 1 and holders.get(key, set()) <= {position}:
                call.bypassed[key] = sizes[key]


def _is_input(saved: Tensor, call: Call) -> bool:
    """Tell a layer's input, or a copy of it in another precision or padded, from its weight."""
    x = call.input
    if saved.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        return True
    weight: Any = call.module.weight
    return saved.numel() >= x.numel() and saved.numel() != weight.numel()
