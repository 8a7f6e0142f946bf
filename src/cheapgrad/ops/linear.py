"""The linear map ``Y = X W.T + b`` with a sketched backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cheapgrad.ops._guards import refuse_forward_mode
from cheapgrad.ops._saved_operands import hand_back, save_operands, split_operands
from cheapgrad.ops.plan import Plan, PoisonedRows, poison
from cheapgrad.sketch import DenseMatrix, Moment, Operands, random
from cheapgrad.sketch.drawn import DrawnRows
from cheapgrad.sketch.operands import AbstractStoredMatrix
from cheapgrad.sketch.transforms import is_transformed


class _SketchedLinear(torch.autograd.Function):
    """Forward is `torch.nn.functional.linear`; backward multiplies sketches."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, examples: int, *kept: Tensor) -> Tensor:
        weight, bias = random.anchor_parameters(weight, bias, kept)
        return multiply(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, plan, examples, *kept = inputs
        ctx.examples = examples
        save_operands(ctx, x, weight, plan, kept)
        if not torch.compiler.is_dynamo_compiling():
            ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            # A row-wise chain that passed over this layer's output did its work.
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors
        weight, kept = split_operands(ctx, saved)
        plan: Plan = ctx.plan
        with torch.no_grad():
            stored, grad_NO = _as_matrices(ctx, plan, kept, grad)
            plan.observe(grad_NO, ctx.examples)
            # Before the draw, whose scores then find G in the processor's cache.
            grad_bias = grad_NO.sum(0) if ctx.needs_input_grad[2] else None
            grad_input, grad_weight = _products(plan, stored, kept, grad_NO, weight, ctx.examples)
            if grad_input is not None:
                grad_input = grad_input.view(ctx.input_shape)
        return hand_back(ctx, "linear layer", grad, saved, (grad_input, grad_weight, grad_bias))


class _EagerSketchedLinear(_SketchedLinear):
    """The same, refusing forward mode by name; compiled graphs take no Function that defines a jvp."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        refuse_forward_mode("linear layer")


def _as_matrices(
    ctx: Any, plan: Plan, kept: tuple[Tensor, ...], grad: Tensor
) -> tuple[AbstractStoredMatrix | None, Tensor]:
    grad_NO = grad.reshape(-1, grad.shape[-1])
    if not ctx.needs_input_grad[1]:
        return None, grad_NO
    inputs = ctx.input_shape[-1]
    if plan.stored is None:
        return DenseMatrix(kept[0].reshape(-1, inputs)), grad_NO
    return plan.restore(kept, grad_NO.shape[0], inputs, grad.dtype), grad_NO


def _products(
    plan: Plan,
    stored: AbstractStoredMatrix | None,
    kept: tuple[Tensor, ...],
    grad_NO: Tensor,
    weight_OI: Tensor | None,
    examples: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Return dX ``[N, I]`` and dW ``[O, I]``, each None where it is not needed."""
    drawn = None
    if plan.cotangent is not None:
        drawn = plan.draw(Operands(Moment.COTANGENT, stored, grad_NO, weight_OI, examples))
    grad_input = None
    if weight_OI is not None:
        grad_input = drawn.input_gradient(weight_OI) if drawn is not None else grad_NO @ weight_OI
    if stored is None:
        return grad_input, None
    # Rows that one of the factors left out may hold a NaN in the other.
    if isinstance(drawn, DrawnRows) and not stored.sketches_rows:
        if drawn.sketched_KO.shape[0] == 0:
            return grad_input, drawn.weight_gradient(stored).add_(sum(poison(tensor) for tensor in kept))
        stored = PoisonedRows(stored, kept)
    grad_weight = drawn.weight_gradient(stored) if drawn is not None else stored.contract(grad_NO)
    return grad_input, grad_weight.add_(poison(grad_NO)) if stored.sketches_rows else grad_weight


def sketched_linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, examples: int | None = None) -> Tensor:
    """Return ``x @ weight.T + bias`` bit for bit as PyTorch does, with the backward pass of `plan`.

    Args:
        x: input, shape ``[..., I]``, floating point.
        weight: shape ``[O, I]``.
        bias: shape ``[O]``, or None.
        plan: the strategies; a plan without strategies is exact.
        examples: B, the number of equal blocks the rows form; by default the first axis of `x`.

    Returns:
        Shape ``[..., O]``.

    Raises:
        SecondDerivativeError: when a gradient through it is differentiated again.
        ForwardModeError: in forward-mode differentiation.
    """
    x, weight, bias = cast_for_autocast(x, weight, bias)
    if x.numel() == 0:
        return torch.nn.functional.linear(x, weight, bias)
    if examples is None:
        examples = x.shape[0] if x.dim() > 1 else 1
    kept: tuple[Tensor, ...] = ()
    if plan.stored is not None and may_need_grad(weight):
        kept = plan.keep(x.reshape(-1, x.shape[-1]), examples)
    function = _SketchedLinear if torch.compiler.is_compiling() else _EagerSketchedLinear
    return function.apply(x, weight, bias, plan, examples, *kept)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias`` as a tensor of its own.

    PyTorch multiplies the rows of a sequence as one matrix and returns a view of the product; a view made inside an
    autograd function may not be overwritten, as an activation in place does.
    """
    output = torch.nn.functional.linear(x, weight, bias)
    return output if torch.compiler.is_dynamo_compiling() else torch.ops.aten._unsafe_view(output, output.shape)


def cast_for_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Return the tensors in the dtype autocast would use, so that low-precision copies are what is saved."""
    device = next(tensor for tensor in tensors if tensor is not None).device.type
    # The meta device has no autocast, and asking for it there raises.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(dtype)
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    )


def may_need_grad(tensor: Tensor) -> bool:
    """Tell whether a gradient may be asked for `tensor`; always true inside torch.func transforms."""
    if tensor.requires_grad or torch.compiler.is_compiling():
        return tensor.requires_grad
    return is_transformed(tensor)
