"""What is measured: a model, the layers of its chosen parameters, a likelihood, and how batches are read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import final

from torch import Tensor, nn

from cheapgrad.curvature.kronecker.fisher import AbstractFisher, ExactFisher
from cheapgrad.curvature.kronecker.layers import LAYER_KINDS, AbstractLayer
from cheapgrad.curvature.kronecker.outputs import AbstractOutputs
from cheapgrad.curvature.kronecker.rows import WeightSharing
from cheapgrad.curvature.operators.batches import BatchReader
from cheapgrad.curvature.operators.parameters import ParameterSelection, select_parameters
from cheapgrad.errors import ModelTypeError, UnsupportedModelError, check_instance, describe_value


@final
@dataclass(frozen=True)
class KroneckerOptions:
    """Choices that all stages share.

    Attributes:
        fisher: which cotangents are sent backward; the exact Gauss–Newton matrix by default.
        sharing: how K-FAC's factors treat positions. The corrected eigenvalues of `ekfac` need no such choice.
        parameters: names of parameters or modules, or tensors; all that require grad by default.
        reader: how a batch becomes outputs, and how much it counts.

    Raises:
        ArgumentError: if one of them is of another kind, such as the name of a rule.
    """

    fisher: AbstractFisher = field(default_factory=ExactFisher)
    sharing: WeightSharing = WeightSharing.EXPAND
    parameters: Iterable[str | Tensor] | None = None
    reader: BatchReader = field(default_factory=BatchReader)

    def __post_init__(self) -> None:
        """Check the kinds."""
        check_instance("fisher", self.fisher, AbstractFisher, "use e.g. kronecker.ExactFisher()")
        check_instance("sharing", self.sharing, WeightSharing, "use WeightSharing.EXPAND or WeightSharing.REDUCE")
        check_instance("reader", self.reader, BatchReader, "use BatchReader(...)")


@final
@dataclass(frozen=True)
class Problem:
    """A model whose chosen parameters all belong to layers with Kronecker factors.

    Attributes:
        model: it.
        likelihood: of its outputs.
        options: choices.
        selection: the chosen parameters, in the order of the vectors that operators multiply.
        layers: of the chosen parameters.
    """

    model: nn.Module
    likelihood: AbstractOutputs
    options: KroneckerOptions
    selection: ParameterSelection
    layers: tuple[AbstractLayer, ...]


def pose_problem(model: nn.Module, likelihood: AbstractOutputs, options: KroneckerOptions | None) -> Problem:
    """Return the problem, or say by name which layers have no Kronecker factors.

    Raises:
        ModelTypeError: if `model` is no module, or `likelihood` no likelihood.
        UnsupportedModelError: listing the layers that are not supported, or if the reader spreads batches over
            processes.
        ArgumentError: if `options` are none.
        UnknownNameError: if a chosen parameter is not the model's.
    """
    if not isinstance(model, nn.Module):
        raise ModelTypeError(f"Kronecker factors are those of a torch.nn.Module, but got {describe_value(model)}")
    if not isinstance(likelihood, AbstractOutputs):
        raise ModelTypeError(
            "Kronecker factors need a likelihood such as CategoricalOutputs() or GaussianOutputs(), but got "
            f"{describe_value(likelihood)}"
        )
    options = KroneckerOptions() if options is None else options
    check_instance("options", options, KroneckerOptions, "use KroneckerOptions(...)")
    if options.reader.process_group is not None:
        raise UnsupportedModelError(
            f"Kronecker factors are not summed over processes, but the reader has the group "
            f"{options.reader.process_group!r}; measure on one process, with all batches"
        )
    selection = select_parameters(model, options.parameters)
    return Problem(model, likelihood, options, selection, find_layers(model, selection))


def find_layers(model: nn.Module, selection: ParameterSelection) -> tuple[AbstractLayer, ...]:
    """Return the layers of the selected parameters.

    Raises:
        UnsupportedModelError: listing every layer that has selected parameters and no factors, with the reason.
    """
    chosen = set(selection.names)
    owners = _find_owners(model)
    layers: list[AbstractLayer] = []
    obstacles: list[str] = []
    for name, module in model.named_modules():
        own = frozenset(own for own, _ in module.named_parameters(recurse=False) if _join(name, own) in chosen)
        if not own:
            continue
        label = f"{name or 'the model itself'} ({type(module).__name__})"
        shared = [other for one in sorted(own) for other in owners[id(module.get_parameter(one))] if other != name]
        kind = next((kind for kind in LAYER_KINDS if isinstance(module, kind.kinds)), None)
        if shared:
            obstacles.append(f"{label}: shares a parameter with {', '.join(shared)}")
        elif kind is None or not own <= {"weight", "bias"}:
            obstacles.append(f"{label}: no factors for its parameters {', '.join(sorted(own))}")
        else:
            layer = kind(name, module, own)
            obstacle = layer.find_obstacle()
            layers.append(layer)
            obstacles += [f"{label}: {obstacle}"] if obstacle else []
    if obstacles:
        kinds = ", ".join(sorted({one.__name__ for kind in LAYER_KINDS for one in kind.kinds}))
        raise UnsupportedModelError(
            f"{len(obstacles)} layers have no Kronecker factors: {'; '.join(obstacles)}. Supported are {kinds}; leave "
            "the others out with parameters=[...] or requires_grad_(False)"
        )
    return tuple(layers)


def _find_owners(model: nn.Module) -> dict[int, list[str]]:
    """Return, by the identity of a parameter, the names of the modules that hold it."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for _, tensor in module.named_parameters(recurse=False):
            owners.setdefault(id(tensor), []).append(name)
    return owners


def _join(module_name: str, own: str) -> str:
    return f"{module_name}.{own}" if module_name else own
