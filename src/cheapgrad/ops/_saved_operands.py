"""What layers with a weight save for their backward pass, and how they hand gradients back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cheapgrad.ops._guards import differentiate_once
from cheapgrad.ops.plan import Plan


def save_operands(ctx: Any, x: Tensor, weight: Tensor, plan: Plan, kept: Sequence[Tensor]) -> None:
    """Save the weight where the input needs a gradient, and what is kept of the input where the weight needs one.

    Args:
        ctx: of a function whose first two inputs are input and weight.
        x: the input.
        weight: the weight.
        plan: the strategies.
        kept: what `Plan.keep` returned.
    """
    ctx.plan = plan
    ctx.input_shape = x.shape
    ctx.kept_count = 0
    saved = [weight] if ctx.needs_input_grad[0] else []
    if ctx.needs_input_grad[1]:
        held = kept if plan.stored is not None else [x]
        ctx.kept_count = len(held)
        saved.extend(held)
    ctx.save_for_backward(*saved)


def split_operands(ctx: Any, saved: tuple[Tensor, ...]) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """Return the weight, or None where it was not saved, and what was kept of the input.

    Args:
        ctx: the context that `save_operands` was given.
        saved: its saved tensors, read once.
    """
    return (saved[0] if ctx.needs_input_grad[0] else None), saved[len(saved) - ctx.kept_count :]


def hand_back(
    ctx: Any, name: str, grad: Tensor, saved: tuple[Tensor, ...], gradients: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Return gradients that refuse to be differentiated again, and None for all further inputs.

    Args:
        ctx: the function's context.
        name: the operation, for the error.
        grad: the cotangent.
        saved: the saved tensors.
        gradients: those of the function's first inputs.
    """
    once = [differentiate_once(gradient, name, grad, *saved) for gradient in gradients]
    return (*once, *([None] * (len(ctx.needs_input_grad) - len(once))))
