"""A batch as a tree of tensors whose first axis counts examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the batch with every tensor in its tuples, lists and dictionaries changed."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, change) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map_tensors(value, change) for value in batch)
    return batch


def list_tensors(batch: Any) -> Iterator[Tensor]:
    """Yield every tensor of the batch."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(batch, note)
    yield from found


def count_examples(batch: Any) -> int | None:
    """Return the length of the first axis that all tensors share, None if there is no such length."""
    lengths = {tensor.shape[0] for tensor in list_tensors(batch) if tensor.dim()}
    return lengths.pop() if len(lengths) == 1 else None


def choose_examples(batch: Any, index: Tensor) -> Any:
    """Return the batch of the given examples, in their order."""
    return map_tensors(batch, lambda tensor: tensor[index.to(tensor.device)] if tensor.dim() else tensor)


def reverse_examples(batch: Any, examples: int) -> Any:
    """Return the batch in reverse order."""
    return choose_examples(batch, torch.arange(examples - 1, -1, -1))
