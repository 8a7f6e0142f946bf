"""Which parameters span the matrix, and the way between their tensors and one vector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cheapgrad.errors import (
    ArgumentError,
    OperandError,
    ShapeError,
    UnknownNameError,
    UnsupportedModelError,
    describe_value,
    nearest_match,
)


@dataclass(frozen=True)
class ParameterSelection:
    """Parameters of a model, in the order in which the vector holds them.

    Attributes:
        names: as in ``model.named_parameters()``.
        shapes: one per name.
        dtype: of all of them.
        device: of all of them.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def size(self) -> int:
        """The number of entries P."""
        return sum(shape.numel() for shape in self.shapes)

    def split(self, vector_P: Tensor) -> dict[str, Tensor]:
        """Return views of a vector ``[P]`` by parameter name.

        Raises:
            ShapeError: if it is not ``[P]``.
        """
        if vector_P.shape != (self.size,):
            raise ShapeError(
                f"{len(self.names)} parameters with {self.size} entries are split from a vector [{self.size}], but "
                f"got a tensor of shape {tuple(vector_P.shape)}"
            )
        pieces = vector_P.split([shape.numel() for shape in self.shapes])
        return {name: piece.view(shape) for name, shape, piece in zip(self.names, self.shapes, pieces, strict=True)}

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return tensors in the selection's order as one vector ``[P]``."""
        return torch.cat([tensor.reshape(-1) for tensor in tensors])


def select_parameters(model: nn.Module, wanted: Iterable[str | Tensor] | None) -> ParameterSelection:
    """Return the selection of `wanted` parameters, given by name, by a module's name or as tensors.

    Args:
        model: owns them.
        wanted: None for all that require grad. The name of a module stands for all its parameters.

    Raises:
        UnknownNameError: if a name is neither a parameter's nor a module's, or a tensor is no parameter of the model.
        ArgumentError: if `wanted` holds something else than names and tensors.
        UnsupportedModelError: if a parameter is sharded, or nothing is left.
        OperandError: if the parameters differ in dtype or device, or are not real.
    """
    if wanted is not None and not isinstance(wanted, (str, Tensor)):
        wanted = _list_wanted(wanted)
    named = dict(model.named_parameters())
    names = (
        [name for name, tensor in named.items() if tensor.requires_grad]
        if wanted is None
        else _resolve(named, [wanted] if isinstance(wanted, (str, Tensor)) else list(wanted))
    )
    if not names:
        raise UnsupportedModelError(
            f"a {type(model).__name__} with {len(named)} parameters has none that "
            f"{'require grad' if wanted is None else 'are selected'}, so there is no curvature; name some of them in "
            "parameters=[...]"
        )
    tensors = [named[name] for name in names]
    for name, tensor in zip(names, tensors, strict=True):
        if type(tensor).__name__ == "DTensor" or hasattr(tensor, "full_tensor"):
            raise UnsupportedModelError(
                f"parameter {name!r} is sharded over processes; take curvature of the model before fully_shard, with "
                "whole parameters on every process"
            )
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    if len(kinds) > 1 or not tensors[0].dtype.is_floating_point:
        texts = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise OperandError(
            f"the parameters of a curvature matrix share one real dtype and one device, but got {texts}; select a "
            "part of them with parameters=[...], or convert the model"
        )
    return ParameterSelection(tuple(names), tuple(tensor.shape for tensor in tensors), *next(iter(kinds)))


def _list_wanted(wanted: Iterable[str | Tensor]) -> list[str | Tensor]:
    items: list[Any] = list(wanted) if isinstance(wanted, Iterable) else [wanted]
    strange = [item for item in items if not isinstance(item, (str, Tensor))]
    if strange:
        raise ArgumentError(
            f"parameters are names of parameters or modules, or tensors, but got {describe_value(strange[0])}; for a "
            'module give its name, e.g. parameters=["head"], or list(module.parameters())'
        )
    return items


def _resolve(named: dict[str, nn.Parameter], wanted: list[str | Tensor]) -> list[str]:
    """Return the names asked for, in the model's order."""
    by_id = {id(tensor): name for name, tensor in named.items()}
    found: set[str] = set()
    for item in wanted:
        if isinstance(item, Tensor):
            if id(item) not in by_id:
                raise UnknownNameError(
                    f"a tensor of shape {tuple(item.shape)} is no parameter of the model; pass names or tensors of "
                    "model.named_parameters()"
                )
            found.add(by_id[id(item)])
            continue
        matches = [name for name in named if name == item or name.startswith(f"{item}.")]
        if not matches:
            raise UnknownNameError(
                f"the model has no parameter or module {item!r} with parameters{nearest_match(str(item), named)}"
            )
        found.update(matches)
    return [name for name in named if name in found]
