"""Whether two batches may stand for independent ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from cheapgrad.curvature.operators import AbstractDataOperator, AbstractOperator, MeanOperator
from cheapgrad.errors import OverlapError

_LISTED = 5


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
        Sees identical operators, and examples all of whose tensors share memory, such as overlapping slices.
        It cannot tell copies of the same examples, as indexing by a tensor makes them, from others; whoever draws them
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
    spans = [span for part in parts_a for span in _spans_of(part)]
    shared = sum(id(part) in own or _lies_in(_spans_of(part), spans) for part in parts_b)
    if operator_a is operator_b or shared:
        raise OverlapError(
            f"operators a and b share {max(shared, 1)} of {len(parts_b)} micro-batches, so b does not measure what a "
            "chose without bias; pass two batches of different examples, or use cross_fit on one"
        )


def _list_parts(operator: AbstractOperator) -> list[Any]:
    """Return what an operator is made of: other operators, or the inputs of each micro-batch that it holds."""
    if isinstance(operator, MeanOperator):
        return [leaf for part in operator.micro_batches for leaf in _list_parts(part.operator)]
    held = operator.held_inputs() if isinstance(operator, AbstractDataOperator) else []
    return held or [operator]


def _spans_of(value: Any) -> list[tuple[int, int]]:
    """Return first and last byte of all tensors in the inputs of a micro-batch."""
    if isinstance(value, Mapping):
        return [span for item in value.values() for span in _spans_of(item)]
    if isinstance(value, (tuple, list)):
        return [span for item in value for span in _spans_of(item)]
    if not isinstance(value, Tensor) or value.numel() == 0 or value.is_meta:
        return []
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return [(value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size())]


def _lies_in(spans: list[tuple[int, int]], others: list[tuple[int, int]]) -> bool:
    """Whether every tensor overlaps one of the others: a mask alone may be shared by all batches."""
    return bool(spans) and all(any(first < end and start < last for start, end in others) for first, last in spans)
