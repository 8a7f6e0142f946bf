"""Whether two batches may stand for independent ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cheapgrad.curvature.operators import (
    AbstractDataOperator,
    AbstractOperator,
    DenseOperator,
    ForeignOperator,
    MeanOperator,
)
from cheapgrad.errors import OverlapError, ShapeError

_LISTED = 5
# Steps for a decision on two tensors' memory; ordinary slices take a few.
_WORK = 100_000

Region = npt.NDArray[Any]


def check_disjoint(indices_a: Iterable[int], indices_b: Iterable[int]) -> None:
    """Raise `OverlapError` if two batches, given by the indices of their examples, share one.

    Args:
        indices_a: indices of the examples of the first batch: a tensor, a list, a range.
        indices_b: indices of the examples of the second batch.

    Raises:
        OverlapError: if an example is in both, or twice in one of them.

    Example:
        >>> check_disjoint(range(32), range(32, 64))
    """
    lists = [[int(index) for index in indices] for indices in (indices_a, indices_b)]
    for name, indices in zip("ab", lists, strict=True):
        if len(set(indices)) < len(indices):
            raise OverlapError(
                f"batch {name} has {len(indices)} examples, but only {len(set(indices))} different ones; "
                "draw without replacement, e.g. by torch.randperm"
            )
    shared = sorted(set(lists[0]) & set(lists[1]))
    if shared:
        shown = ", ".join(str(index) for index in shared[:_LISTED]) + (", …" if len(shared) > _LISTED else "")
        raise OverlapError(
            f"batches a and b share {len(shared)} examples ({shown}), so b does not measure what a chose without bias; "
            "split one permutation: a, b = torch.randperm(n)[:2 * size].split(size)"
        )


def check_independent(operator_a: AbstractOperator, operator_b: AbstractOperator) -> None:
    """Raise `OverlapError` if the same operator, micro-batch or memory is part of both.

    Args:
        operator_a: of the batch that chooses directions.
        operator_b: of the batch that measures along them.

    Law:
        Sees identical operators, plain matrices (torch, NumPy) that share memory, and examples all of whose tensors
        share memory, such as overlapping slices. Slices that only interleave, such as even rows and odd ones, are
        apart. Copies of the same examples, as indexing by a tensor makes them, look like others; whoever draws them
        uses `check_disjoint`. Batches that come from a loader are not looked at.

    Raises:
        OverlapError: naming how many micro-batches are shared.

    Example:
        >>> import torch
        >>> from cheapgrad.curvature import DenseOperator
        >>> check_independent(DenseOperator(torch.eye(2)), DenseOperator(torch.eye(2)))
    """
    # Kept until the end: an operator that was made on the fly could otherwise hand its identity on.
    parts_a, parts_b = _list_parts(operator_a), _list_parts(operator_b)
    own = {id(part) for part in parts_a}
    regions = [region for part in parts_a for region in _regions_of(part)]
    shared = sum(id(part) in own or _lies_in(_regions_of(part), regions) for part in parts_b)
    if operator_a is operator_b or shared:
        raise OverlapError(
            f"operators a and b share {max(shared, 1)} of {len(parts_b)} micro-batches, so b does not measure what a "
            "chose without bias; pass two batches of different examples, or use cross_fit on one"
        )


def check_same_size(operator_a: AbstractOperator, operator_b: AbstractOperator) -> None:
    """Raise `ShapeError` if the operators of two batches have not the same number of parameters."""
    if operator_a.shape != operator_b.shape:
        sizes = [f"{operator.shape[0]}×{operator.shape[1]}" for operator in (operator_a, operator_b)]
        raise ShapeError(
            f"operator a is {sizes[0]}, but operator b is {sizes[1]}; give both batches the same parameters"
        )


def count_shared(inputs_a: Iterable[Any], inputs_b: Iterable[Any]) -> int:
    """Return how many micro-batches of b, given by their inputs, hold nothing but memory that those of a hold too."""
    regions = [region for inputs in inputs_a for region in _regions_of(inputs)]
    return sum(_lies_in(_regions_of(inputs), regions) for inputs in inputs_b)


def _list_parts(operator: AbstractOperator) -> list[Any]:
    """Return what an operator is made of: operators, matrices, or the inputs of each micro-batch that it holds."""
    if isinstance(operator, MeanOperator):
        return [leaf for part in operator.micro_batches for leaf in _list_parts(part.operator)]
    if isinstance(operator, DenseOperator | ForeignOperator):
        # Each is made anew from a plain matrix, which alone tells whether it is the same.
        return [operator.matrix]
    held = operator.held_inputs() if isinstance(operator, AbstractDataOperator) else []
    return held or [operator]


class _Addresses:
    """Where a tensor's entries lie, in the form that NumPy asks for; nobody reads what is there."""

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.element_size()
        self.__array_interface__ = {
            "data": (tensor.data_ptr(), True),
            "shape": tuple(tensor.shape),
            "strides": tuple(size * stride for stride in tensor.stride()),
            "typestr": f"|V{size}",
            "version": 3,
        }


def _regions_of(value: Any) -> list[Region]:
    """Return the memory of all tensors in the inputs of a micro-batch."""
    if isinstance(value, Mapping):
        return [region for item in value.values() for region in _regions_of(item)]
    if isinstance(value, (tuple, list)):
        return [region for item in value for region in _regions_of(item)]
    if isinstance(value, np.ndarray):
        return [value]
    if not isinstance(value, Tensor) or value.numel() == 0 or value.is_meta or value.layout is not torch.strided:
        return []
    return [np.asarray(_Addresses(value))]


def _lies_in(regions: list[Region], others: list[Region]) -> bool:
    """Whether every tensor overlaps one of the others: a mask alone may be shared by all batches."""
    return bool(regions) and all(any(_overlap(region, other) for other in others) for region in regions)


def _overlap(region: Region, other: Region) -> bool:
    try:
        # NumPy takes any number; its annotation knows two.
        return np.shares_memory(region, other, max_work=_WORK)  # pyright: ignore[reportArgumentType]
    except np.exceptions.TooHardError:
        # Strides that hardly occur: where the ranges meet, say so.
        return True
