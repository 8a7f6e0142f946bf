"""How noisy is the gradient of the mini-batch itself?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.auditing._errors_drawn import inner_product
from cheapgrad.auditing._examples import choose_examples, count_examples, reverse_examples
from cheapgrad.auditing._step import Step
from cheapgrad.errors import BackwardError, BatchOrderError, ForwardError, LossError, ReferenceGradientError

# Into how many micro-batches the batch is cut: as many degrees of freedom and one, for each direction of the gradient.
_MICRO_BATCHES = 16
# The micro-batches' gradients add up to the batch's to within this fraction, or a remark says so.
_ADDS_UP = 0.1
# By how much the loss may change with the order of examples: sums are rounded in another order.
_SAME_LOSS_ULPS = 4096


@dataclass(frozen=True)
class MiniBatchNoise:
    """Variance of the gradient of the batch as a sample of examples.

    Attributes:
        variances: ``E‖g − E g‖²`` of each tensor, shape ``[T]``; None if unknown.
        remark: what a reader has to know.
    """

    variances: Tensor | None
    remark: str = ""


def measure_mini_batch_noise(
    step: Step, batch: Any, make_seed: Callable[[str], int], *, draws_noise: bool
) -> MiniBatchNoise:
    """Cut the batch into micro-batches and take the spread of their exact gradients.

    With K micro-batches of b_k examples, ``S² = Σ b_k ‖g_k − ḡ‖² / (K − 1)`` estimates the variance of the gradient of
    one example, and S² / B that of the mean over B. A loss that is a sum is recognised by its gradients' sizes.

    Args:
        step: whose exact gradient is taken.
        batch: a tree of tensors whose first axis counts examples.
        make_seed: a seed for each text.
        draws_noise: whether the forward pass draws, so that the loss of another order cannot be compared.

    Raises:
        BatchOrderError: the loss is another when the examples are in reverse order.
    """
    examples = count_examples(batch)
    if examples is None:
        return MiniBatchNoise(None, "mini-batch variance unknown: the batch's tensors share no first axis")
    if examples < 2:
        return MiniBatchNoise(None, "mini-batch variance unknown: the batch is a single example")
    whole = step.draw_exact(batch, make_seed("whole"))
    if not draws_noise and whole.loss is not None:
        backward = step.draw_exact(reverse_examples(batch, examples), make_seed("whole"))
        slack = _SAME_LOSS_ULPS * torch.finfo(whole.tensors[0].dtype).eps * max(abs(whole.loss), 1e-3)
        if backward.loss is not None and not abs(whole.loss - backward.loss) <= slack:
            raise BatchOrderError(
                f"the loss is {whole.loss:.9g}, and {backward.loss:.9g} with the batch's {examples} entries of the "
                "first axis in reverse order, so these are no examples that a mini-batch could be cut into; pass "
                "split=False to leave out the mini-batch's variance"
            )
    # Two examples at least where there are enough: batch norm refuses one.
    parts = torch.arange(examples).tensor_split(min(_MICRO_BATCHES, max(2, examples // 2)))
    try:
        gradients = [
            step.draw_exact(choose_examples(batch, part), make_seed(f"part {number}")).tensors
            for number, part in enumerate(parts)
        ]
    except (ForwardError, BackwardError, LossError, ReferenceGradientError) as error:
        return MiniBatchNoise(None, f"mini-batch variance unknown: on {len(parts[0])} examples, {error}")
    return _spread(whole.tensors, gradients, [len(part) for part in parts], draws_noise)


def _spread(whole: list[Tensor], gradients: list[list[Tensor]], counts: list[int], draws_noise: bool) -> MiniBatchNoise:
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
    variances = [
        sum(count * _squared(tensor - mean) for count, tensor in zip(counts, tensors, strict=True))
        / (len(counts) - 1)
        / examples
        * scale**2
        for mean, tensors in zip(means, zip(*gradients, strict=True), strict=True)
    ]
    remark = ""
    if not draws_noise and min(from_sum, from_mean) > _ADDS_UP**2 * sum(map(_squared, whole)):
        remark = "mini-batch variance approximate: the gradients of micro-batches do not add up to that of the batch"
    return MiniBatchNoise(torch.tensor(variances, dtype=torch.float64), remark)


def _add_weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total


def _distance(first: list[Tensor], second: list[Tensor]) -> float:
    return sum(_squared(one - two) for one, two in zip(first, second, strict=True))


def _squared(tensor: Tensor) -> float:
    return float(inner_product(tensor, tensor))
