"""What no rule reaches: modules without a sketched operation, and functions called inside a forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cheapgrad.convert.kinds import kind_of
from cheapgrad.convert.layer_record import LayerRecord
from cheapgrad.convert.sketched_layer import SketchedLayer
from cheapgrad.cost import CostReport
from cheapgrad.cost.units import format_bytes

# Why a code of what a module stores would be a bias, whatever the codec.
_NOT_LINEAR: dict[type[nn.Module], str] = {
    nn.Softmax: "its backward pass multiplies its stored output with itself",
    nn.Softmin: "its backward pass multiplies its stored output with itself",
    nn.Softmax2d: "its backward pass multiplies its stored output with itself",
    nn.LogSoftmax: "its backward pass takes the exponential of its stored output",
    nn.GLU: "its backward pass multiplies a sigmoid, its slope and a value that all come from the stored input",
    nn.LocalResponseNorm: "its backward pass takes powers of what it stores",
    nn.CrossMapLRN2d: "its backward pass takes powers of what it stores",
    nn.LPPool1d: "its backward pass takes powers of its stored input",
    nn.LPPool2d: "its backward pass takes powers of its stored input",
    nn.LPPool3d: "its backward pass takes powers of its stored input",
}
# Where modules live that hold something for backward and have no parameters.
_HOMES = tuple(f"torch.nn.modules.{name}" for name in ("activation", "dropout", "normalization", "pooling"))
_ATTENTION = "queries, keys and values stay exact: a softmax is not linear in them, and a code would be biased"
# Functions whose backward pass is not linear in what they store either, by the operation's name without underscores.
_REFUSED_FUNCTIONS: dict[str, type[nn.Module]] = {"softmax": nn.Softmax, "logsoftmax": nn.LogSoftmax, "glu": nn.GLU}
# Modules that a rule reaches in the place of a function, by the operation's name without underscores.
_MODULES = {
    name.lower(): name
    for name in ("GELU", "SiLU", "Mish", "Hardswish", "Hardsigmoid", "Hardtanh", "ReLU", "ELU", "Softplus", "Tanh")
} | {
    "leakyrelu": "LeakyReLU",
    "logsigmoid": "LogSigmoid",
    "threshold": "Threshold",
    "sigmoid": "Sigmoid",
    "prelu": "PReLU",
    "nativelayernorm": "LayerNorm",
    "nativegroupnorm": "GroupNorm",
    "nativebatchnorm": "BatchNorm2d",
    "nativedropout": "Dropout",
    "maxpool2dwithindices": "MaxPool2d",
    "maxpool3dwithindices": "MaxPool3d",
    "avgpool2d": "AvgPool2d",
    "avgpool3d": "AvgPool3d",
    "addmm": "Linear",
    "convolution": "Conv2d",
}


def is_listed(module: nn.Module) -> bool:
    """Tell whether a module without parameters is listed although it cannot be converted: it holds something.

    >>> is_listed(nn.Softmax(-1)), is_listed(nn.Flatten())
    (True, False)
    """
    home = type(module).__module__
    return home in _HOMES or home.startswith("transformers.activations")


def why_uncovered(module: nn.Module) -> str:
    """Return why a module of a kind that cannot be converted is left alone.

    >>> why_uncovered(nn.Softmax(-1))[:62]
    'refused: its backward pass multiplies its stored output with i'
    """
    for cls in _NOT_LINEAR:
        if isinstance(module, cls):
            return _refusal(cls)
    stock = next(
        (kind_of(base) for base in type(module).__mro__[1:] if issubclass(base, nn.Module) and kind_of(base)), None
    )
    if stock is not None:
        return f"unsupported: {type(module).__name__} overrides the forward of {stock.name}"
    return f"unsupported: no sketched operation for {type(module).__name__}"


def _refusal(cls: type[nn.Module]) -> str:
    return f"refused: {_NOT_LINEAR[cls]}, so that a code of it would give a biased gradient; {cls.__name__} stays exact"


@dataclass(frozen=True)
class HeldElsewhere:
    """Bytes held for backward that no rule of a conversion reached.

    Attributes:
        module: qualified name; empty for the model itself, ``"(outside)"`` for the loss.
        kind: class name of the module.
        operation: such as ``"aten::gelu"``.
        held_bytes: what it holds after the forward pass, every storage counted once.
        reason: why it is not reached, and what to do where something can be done.
    """

    module: str
    kind: str
    operation: str
    held_bytes: int
    reason: str

    def __str__(self) -> str:
        return f"{self.operation} in {self.module or '(model)'}: {format_bytes(self.held_bytes)} ({self.reason})"

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-able data."""
        return dataclasses.asdict(self)


def list_uncovered(model: nn.Module, records: Iterable[LayerRecord], report: CostReport) -> tuple[HeldElsewhere, ...]:
    """Return what operations hold that are not ours, those that hold most first.

    Args:
        model: the converted model.
        records: what happened to its layers.
        report: of a scan of the model as it is.
    """
    own = set(_own_functions())
    remarks = {record.name: record.remark for record in records if record.status != "converted"}
    modules = dict(model.named_modules(remove_duplicate=False))
    kinds = {row.name: row.kind for row in report.rows}
    found = []
    for cost in report.operations:
        module = modules.get(cost.module)
        # A layer of whose stored tensors nothing was asked holds what it is meant to.
        is_meant = isinstance(module, SketchedLayer) and module._cheapgrad.plan.stored is None
        if not cost.saved_bytes or cost.operation in own or (is_meant and not _is_attention(cost.operation, module)):
            continue
        reason = _reason(cost.operation, module, remarks.get(cost.module, ""))
        kind = kinds.get(cost.module, "")
        found.append(HeldElsewhere(cost.module, kind, cost.operation, cost.saved_bytes, reason))
    return tuple(sorted(found, key=lambda each: -each.held_bytes))


def _own_functions(base: type = torch.autograd.Function) -> Iterator[str]:
    for cls in base.__subclasses__():
        if cls.__module__.startswith("cheapgrad."):
            yield cls.__name__
        yield from _own_functions(cls)


def _is_attention(operation: str, module: nn.Module | None) -> bool:
    return "dot_product" in operation or isinstance(module, nn.MultiheadAttention)


def _why_stock(module: SketchedLayer) -> str:
    """Return why PyTorch's own code ran in a converted layer."""
    name = module._cheapgrad.original_class.__name__
    if not module.training:
        return f"{name} is in eval() mode, where PyTorch's own code runs"
    if getattr(module, "inplace", False):
        return (
            "in place over a view, or between layers that are no chain: PyTorch's own code ran; "
            f"{name}(inplace=False) is reached"
        )
    return f"PyTorch's own code ran: {name} has no sketched one for this input"


def _reason(operation: str, module: nn.Module | None, remark: str) -> str:
    if _is_attention(operation, module):
        return _ATTENTION
    if isinstance(module, SketchedLayer):
        return _why_stock(module)
    name = operation.removeprefix("aten::").replace("_", "").lower()
    if remark:
        return remark
    if module is None:
        return "outside of the model" + ("; cheapgrad.linear_cross_entropy holds less" if "softmax" in name else "")
    if operation == "(checkpoint)":
        return "kept by a checkpoint, which runs its block again"
    if kind_of(type(module)) is not None:
        return "no rule matches this module, or its input is not one that is covered"
    if is_listed(module):
        return why_uncovered(module)
    if name in _REFUSED_FUNCTIONS:
        return _refusal(_REFUSED_FUNCTIONS[name])
    instead = f"; torch.nn.{_MODULES[name]} in its place is reached" if name in _MODULES else ""
    return f"called inside the forward of {type(module).__name__}, not between layers of a chain{instead}"


def remark_on_uncovered(found: tuple[HeldElsewhere, ...]) -> str:
    """Return one line about the largest of them, or an empty string if there are none."""
    if not found:
        return ""
    shown = "; ".join(map(str, found[:3])) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
    total = format_bytes(sum(each.held_bytes for each in found))
    return f"after: {total} held by what no rule reaches: {shown}; handle.uncovered(batch) lists all"
