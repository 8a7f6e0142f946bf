"""A point and a direction, as somebody gives them, held against each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from cheapgrad.errors import DirectionError, describe_value

Point = Tensor | Sequence[Tensor]


def check_pair(point: Point, direction: Point) -> tuple[list[Tensor], list[Tensor]]:
    """Return point and direction as lists of tensors that fit."""
    points, directions = _list_tensors("point", point), _list_tensors("direction", direction)
    if len(points) != len(directions) or not points:
        raise DirectionError(
            f"the point has {len(points)} tensors and the direction {len(directions)}; give one for each"
        )
    for place, (at, along) in enumerate(zip(points, directions, strict=True)):
        if not at.is_floating_point():
            raise DirectionError(
                f"tensor {place} of the point is {at.dtype}; only floating-point tensors have gradients"
            )
        if not bool(torch.isfinite(at).all()):
            raise DirectionError(
                f"tensor {place} of the point has {int((~torch.isfinite(at)).sum())} entries that are not finite; "
                "nothing has a derivative there, so use a finite point"
            )
        if at.shape != along.shape or at.dtype != along.dtype or at.device != along.device:
            raise DirectionError(
                f"tensor {place} of the direction is {_describe(along)}, but that of the point {_describe(at)}; "
                "make them alike, e.g. with torch.randn_like"
            )
        if not bool(torch.isfinite(along).all()):
            raise DirectionError(
                f"tensor {place} of the direction has entries that are not finite; use a finite direction"
            )
    if not any(bool(along.any()) for along in directions):
        raise DirectionError(
            f"the direction is zero in all of its {len(directions)} tensor(s), so it decides nothing; draw one, e.g. "
            "with torch.randn_like"
        )
    return points, [along.detach() for along in directions]


def _list_tensors(name: str, value: object) -> list[Tensor]:
    """Return a point or a direction as a list of tensors."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (str, Mapping, nn.Module)) or not isinstance(value, Iterable):
        raise DirectionError(f"the {name} is {describe_value(value)}; give a tensor or a list of tensors")
    tensors = list(value)
    for place, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise DirectionError(f"entry {place} of the {name} is {describe_value(tensor)}; give tensors only")
    return tensors


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
