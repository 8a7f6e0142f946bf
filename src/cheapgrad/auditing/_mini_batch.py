"""How noisy is the gradient of the mini-batch itself?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.auditing._errors_drawn import inner_product
from cheapgrad.auditing._example_order import check_order
from cheapgrad.auditing._examples import choose_examples, count_examples
from cheapgrad.auditing._step import Step
from cheapgrad.errors import BackwardError, ForwardError, LossError, ReferenceGradientError

# Into how many micro-batches the batch is cut: as many degrees of freedom and one, for each direction of the gradient.
_MICRO_BATCHES = 16
# The micro-batches' gradients add up to the batch's to within this fraction, or a remark says so.
_ADDS_UP = 0.1


@dataclass(frozen=True)
class MiniBatchNoise:
    """Variance of the gradient of the batch as a sample of examples.

    Attributes:
        variances: ``E‖g − E g‖²`` of each tensor, shape ``[T]``; None if unknown.
        remarks: what a reader has to know.
        entries: the variance of every entry of each tensor, where it is known and was to be kept.
    """

    variances: Tensor | None
    remarks: tuple[str, ...] = ()
    entries: tuple[Tensor, ...] = ()


def measure_mini_batch_noise(
    step: Step, batch: Any, make_seed: Callable[[str], int], *, draws_noise: bool, keeps_entries: bool = False
) -> MiniBatchNoise:
    """Cut the batch into micro-batches and take the spread of their exact gradients.

    With K micro-batches of b_k examples, ``S² = Σ b_k ‖g_k − ḡ‖² / (K − 1)`` estimates the variance of the gradient of
    one example, and S² / B that of the mean over B. A loss that is a sum is recognised by its gradients' sizes.

    Args:
        step: whose exact gradient is taken.
        batch: a tree of tensors whose first axis counts examples.
        make_seed: a seed for each text.
        draws_noise: whether the forward pass draws: gradients of micro-batches then do not add up to the batch's.
        keeps_entries: whether the variance of every entry is wanted.

    Raises:
        BatchOrderError: the loss is another when the examples are in reverse order; see `check_order`.
    """
    examples = count_examples(batch)
    if examples is None:
        return MiniBatchNoise(None, ("mini-batch variance unknown: the batch's tensors share no first axis",))
    if examples < 2:
        return MiniBatchNoise(None, ("mini-batch variance unknown: the batch is a single example",))
    whole = step.draw_exact(batch, make_seed("whole"))
    is_told = not draws_noise and whole.loss is not None
    remarks = check_order(step, batch, examples, whole if is_told else None, make_seed)
    # Two examples at least where there are enough: batch norm refuses one.
    parts = torch.arange(examples).tensor_split(min(_MICRO_BATCHES, max(2, examples // 2)))
    try:
        gradients = [
            step.draw_exact(choose_examples(batch, part), make_seed(f"part {number}")).tensors
            for number, part in enumerate(parts)
        ]
    except (ForwardError, BackwardError, LossError, ReferenceGradientError) as error:
        return MiniBatchNoise(None, (*remarks, f"mini-batch variance unknown: on {len(parts[0])} examples, {error}"))
    noise = _spread(whole.tensors, gradients, [len(part) for part in parts], draws_noise, keeps_entries)
    return dataclasses.replace(noise, remarks=(*remarks, *noise.remarks))


def _spread(
    whole: list[Tensor], gradients: list[list[Tensor]], counts: list[int], draws_noise: bool, keeps_entries: bool
) -> MiniBatchNoise:
    examples = sum(counts)
    sums = [_add_weighted(tensors, [1.0] * len(counts)) for tensors in zip(*gradients, strict=True)]
    shares = [count / examples for count in counts]
    means = [_add_weighted(tensors, shares) for tensors in zip(*gradients, strict=True)]
    from_sum, from_mean = _distance(whole, sums), _distance(whole, means)
    scale = 1.0
    if from_sum < from_mean:
        # The loss is a sum: over b examples, b times their mean.
        scale = float(examples)
        gradients = [[tensor / count for tensor in part] for count, part in zip(counts, gradients, strict=True)]
        means = [total / examples for total in sums]
    unit = scale**2 / (len(counts) - 1) / examples
    variances: list[float] = []
    entries: list[Tensor] = []
    for mean, tensors in zip(means, zip(*gradients, strict=True), strict=True):
        entry = torch.zeros_like(mean, dtype=torch.float64)
        for count, tensor in zip(counts, tensors, strict=True):
            entry.add_((tensor - mean).double().square_(), alpha=count * unit)
        variances.append(float(entry.sum()))
        if keeps_entries:
            entries.append(entry.to(torch.promote_types(mean.dtype, torch.float32)))
    remarks: tuple[str, ...] = ()
    if not draws_noise and min(from_sum, from_mean) > _ADDS_UP**2 * sum(map(_squared, whole)):
        remarks = (
            "mini-batch variance approximate: the gradients of micro-batches do not add up to that of the batch",
        )
    return MiniBatchNoise(torch.tensor(variances, dtype=torch.float64), remarks, tuple(entries))


def _add_weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total


def _distance(first: list[Tensor], second: list[Tensor]) -> float:
    return sum(_squared(one - two) for one, two in zip(first, second, strict=True))


def _squared(tensor: Tensor) -> float:
    return float(inner_product(tensor, tensor))
