"""Batches: the forms they come in, how the model reads them, and how much each of them counts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cheapgrad.curvature.operators.unequal_terms import UnequalTerms
from cheapgrad.errors import BatchError, check_instance, describe_value


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        inputs: what the model is run on.
        targets: what the loss compares the outputs with; the whole dict for a batch that is one.
        examples: how much it counts in a mean.
        index: its place among the micro-batches, from which its random draws are seeded.
    """

    inputs: Any
    targets: Any
    examples: float
    index: int


@dataclass(frozen=True)
class BatchReader:
    """How a batch becomes outputs, how much it counts, and over which processes the batches are spread.

    Attributes:
        predict: ``predict(model, inputs) -> outputs``. By default ``model(inputs)`` for a tensor, ``model(**inputs)``
            for a dict and ``model(*inputs)`` for a tuple or list. Give one that returns the logits where a model
            returns a record of several things.
        size: ``size(batch) -> float``, for a batch as it was given: the number of terms that its loss is the mean of,
            such as the tokens that are not padding. By default the leading dimension of its first tensor.
        process_group: of torch.distributed, if every process has other batches. All processes must then make the same
            calls with the same operands, and get the same products, those of all batches together.

    Example:
        >>> reader = BatchReader(predict=lambda model, inputs: model(inputs).logits)
    """

    predict: Callable[[nn.Module, Any], Any] | None = None
    size: Callable[[Any], float] | None = None
    process_group: Any = None

    def run(self, model: nn.Module, inputs: Any) -> Any:
        """Run the model on the inputs of a batch."""
        if self.predict is not None:
            return self.predict(model, inputs)
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)

    def read(self, given: Any, index: int, device: torch.device) -> Batch:
        """Return a batch as it was given in one form, on the device.

        Raises:
            BatchError: if it is neither a pair nor a dict, or counts for nothing.
        """
        if isinstance(given, Mapping):
            moved = move_to(given, device)
            inputs, targets = moved, moved
        elif is_pair(given):
            inputs, targets = move_to(given[0], device), move_to(given[1], device)
        else:
            raise BatchError(
                f"a batch is a pair (inputs, targets) or a dict, but got {describe_value(given)}; wrap it, or give a "
                "dict and BatchReader(predict=...)"
            )
        examples = float(self.size(given) if self.size is not None else _leading_size(inputs))
        if not 0 < examples < float("inf"):
            raise BatchError(f"batch {index} counts for {examples:g} examples; leave it out, or correct the size")
        return Batch(inputs, targets, examples, index)


def is_pair(given: Any) -> bool:
    """Tell whether this is one batch ``(inputs, targets)``: two things, the second of which is a tensor."""
    return isinstance(given, (tuple, list)) and len(given) == 2 and isinstance(given[1], Tensor)


class Batches:
    """Micro-batches that can be gone through again and again.

    Args:
        given: one pair or dict, or an iterable of them that starts anew each time, such as a list or a `DataLoader`.
            A list is read once, here; anything else in each pass.
        reader: reads them.
        device: where they are moved to.
        unequal: refuses batches whose terms do not count alike; None where the loss has no such terms.

    Raises:
        BatchError: if there are none, they can be gone through once only, or their terms do not count alike.
    """

    def __init__(
        self, given: Any, reader: BatchReader, device: torch.device, unequal: UnequalTerms | None = None
    ) -> None:
        check_instance("reader", reader, BatchReader, "use BatchReader(...)")
        self._reader, self._device, self._unequal = reader, device, unequal
        self._held: tuple[Batch, ...] | None = None
        self._source: Iterable[Any] = ()
        if isinstance(given, Mapping) or is_pair(given):
            given = [given]
        if isinstance(given, (tuple, list)):
            self._held = tuple(self._read(given))
            if not self._held:
                raise BatchError("curvature needs at least one batch, but got an empty list")
        elif isinstance(given, Tensor) or not hasattr(given, "__iter__"):
            raise BatchError(
                "batches are a pair (inputs, targets), a dict, or an iterable of those, but got "
                f"{describe_value(given)}"
            )
        elif iter(given) is given:
            raise BatchError(
                f"a {type(given).__name__} can be gone through once only, and every product needs all batches; use "
                "list(batches)"
            )
        else:
            self._source = given

    def __iter__(self) -> Iterator[Batch]:
        if self._held is not None:
            yield from self._held
            return
        is_empty = True
        for batch in self._read(self._source):
            is_empty = False
            yield batch
        if is_empty:
            raise BatchError(
                f"a {type(self._source).__name__} gave no batch; is it exhausted, or smaller than one batch with "
                "drop_last=True?"
            )

    def held(self) -> Batches:
        """Return the same batches, in memory."""
        return self._of(tuple(self))

    def held_inputs(self) -> list[Any]:
        """Return the inputs of the batches in memory; none where they come from a loader."""
        return [batch.inputs for batch in self._held or ()]

    def singles(self) -> tuple[Batches, ...]:
        """Return each batch by itself, in memory, with the index it has here."""
        return tuple(self._of((batch,)) for batch in self)

    def _read(self, source: Iterable[Any]) -> Iterator[Batch]:
        first: float | None = None
        for index, item in enumerate(source):
            batch = self._reader.read(item, index, self._device)
            if self._unequal is not None:
                share = self._unequal.share_of(batch.targets)
                first = share if first is None else first
                self._unequal.compare(first, share, index)
            yield batch

    def _of(self, batches: tuple[Batch, ...]) -> Batches:
        part = copy.copy(self)
        part._source, part._held = (), batches
        return part


def move_to(value: Any, device: torch.device) -> Any:
    """Return the inputs or targets of a batch with all their tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: move_to(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [move_to(item, device) for item in value]
        # A named tuple takes its items one by one.
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _leading_size(inputs: Any) -> int:
    if isinstance(inputs, Mapping):
        values = inputs.values()
    else:
        values = inputs if isinstance(inputs, (tuple, list)) else [inputs]
    for value in values:
        if isinstance(value, Tensor) and value.ndim:
            return value.shape[0]
    raise BatchError(
        f"inputs of type {type(inputs).__name__} hold no tensor whose leading dimension counts the examples; give "
        "BatchReader(size=...)"
    )
