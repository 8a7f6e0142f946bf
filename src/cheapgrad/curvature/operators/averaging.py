"""Means over batches and over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from cheapgrad.curvature.operators.batches import Batch
from cheapgrad.errors import OperandError


def mean_over_batches(batches: Iterable[Batch], compute: Callable[[Batch], Tensor]) -> tuple[Tensor, float]:
    """Return ``Σ n_i · compute(batch_i) / Σ n_i`` and ``Σ n_i``; a single batch's value is returned as it is."""
    mean, count = torch.empty(0), 0.0
    for batch in batches:
        value = compute(batch)
        count += batch.examples
        share = batch.examples / count
        mean = value if share == 1 else torch.lerp(mean, value, share)
    return mean, count


def mean_over_processes(mean: Tensor, count: float, operand: Tensor | None, group: Any) -> Tensor:
    """Return the mean over the group's processes, weighted by their counts.

    Raises:
        OperandError: if the processes did not multiply the same operand.
    """
    if group is None:
        return mean
    mark = 0.0 if operand is None else float(operand.double().sum()) + float(operand.double().norm())
    facts = torch.tensor([count, mark, mark * mark, 1.0], dtype=torch.float64, device=mean.device)
    torch.distributed.all_reduce(facts, group=group)
    total, marks, squares, processes = facts.tolist()
    if squares - marks * marks / processes > 1e-9 * squares:
        raise OperandError(
            f"the {processes:g} processes of the group multiply different operands (their checksums average "
            f"{marks / processes:.6g} with mean square {squares / processes:.6g}); seed their generators alike"
        )
    mean = mean.contiguous() * (count / total)
    torch.distributed.all_reduce(mean, group=group)
    return mean
