"""Diagonals of the curvature, shaped like the parameters: what second-order optimisers take in their step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from cheapgrad.curvature.operators.execution import has_lost_derivative, walk_graph
from cheapgrad.errors import (
    ArgumentError,
    LossError,
    NonFiniteCurvatureError,
    StochasticModelError,
    UnsupportedModelError,
    check_count,
    check_instance,
    describe_value,
)

# Where the functions of converted layers live; this room does not know them otherwise.
_SKETCHED = "cheapgrad.ops."


def estimate_hessian_diagonal(
    loss: Tensor,
    parameters: Iterable[Tensor],
    *,
    draws: int = 1,
    average_kernels: bool = False,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Estimate the diagonal of the Hessian from the graph of a loss, by Hutchinson's method.

    ``E[z ⊙ H z] = diag H`` for random signs z. The result goes into steps such as ``step(hessian=...)`` of AdaHessian.

    Args:
        loss: a scalar, not yet backpropagated; its graph is kept, so ``loss.backward()`` still works after.
        parameters: those to differentiate by.
        draws: how many z to average over, at least 1.
        average_kernels: replace each entry of a convolution's weight by the mean over its kernel, as AdaHessian does:
            less variance, and biased for the entries.
        generator: of the signs; torch's default one if left out.

    Returns:
        One tensor for each parameter, of its shape; zeros where the loss does not depend on it.

    Law:
        Unbiased for the batch's diagonal. Variance of an entry: ``Σ_{j≠i} H_ij² / draws``. Since no direction is
        chosen, the mini-batch adds no bias either; its inverse or square root is biased, see `correct_inverse`. Cost:
        one gradient, and two to four more a draw. No graph is left behind but that of the loss.

    Raises:
        LossError: if the loss is no scalar with a graph.
        BudgetError: if `draws` is no positive whole number.
        ArgumentError: if the parameters are no list of tensors that require grad, such as a single tensor.
        UnsupportedModelError: if PyTorch lacks a second derivative.
        SecondDerivativeError: if a converted layer has drawn in the forward pass: run it under ``handle.exact()``.
        NonFiniteCurvatureError: if a product is not finite.

    Example:
        >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> estimate_hessian_diagonal((weight**3).sum(), [weight])
        [tensor([ 6., 12.])]

    References:
        Bekas, Kokiopoulou and Saad (2007); its use and the averaging over kernels: AdaHessian, arXiv:2006.00719.
    """
    check_count("draws", draws)
    _check_loss(loss)
    parameters = _list_parameters(parameters)
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    if has_lost_derivative([loss, *(gradient for gradient in gradients if gradient is not None)]):
        raise UnsupportedModelError(
            "the loss goes through a function that is marked once_differentiable, whose part of the second derivative "
            "would be missing; replace it by one with second derivatives"
        )
    used = [gradient for gradient in gradients if gradient is not None and gradient.requires_grad]
    for _ in range(draws if used else 0):
        signs = [_draw_signs(parameter, generator) for parameter in parameters]
        cotangents = [
            sign
            for sign, gradient in zip(signs, gradients, strict=True)
            if gradient is not None and gradient.requires_grad
        ]
        products = torch.autograd.grad(used, parameters, cotangents, retain_graph=True, allow_unused=True)
        for total, sign, product in zip(totals, signs, products, strict=True):
            if product is not None:
                total += sign * product / draws
    _check_finite(totals)
    if average_kernels:
        totals = [
            total.mean(tuple(range(2, total.ndim)), keepdim=True).expand_as(total).clone() if total.ndim > 2 else total
            for total in totals
        ]
    return totals


def estimate_gauss_newton_diagonal(
    logits: Tensor,
    parameters: Iterable[Tensor],
    *,
    draws: int = 1,
    generator: torch.Generator | None = None,
    loss_function: Callable[[Tensor, Tensor], Tensor] = torch.nn.functional.cross_entropy,
) -> list[Tensor]:
    """Estimate the diagonal of the Gauss-Newton matrix of a classifier from its logits (Gauss-Newton-Bartlett).

    Labels ŷ are drawn from the model's own predictions; with ĝ the gradient of the mean loss at these labels over N
    predictions, ``E[N ĝ ⊙ ĝ]`` is the diagonal of the Gauss-Newton matrix of the mean loss (Bartlett's identity).

    Args:
        logits: ``[..., C]`` with their graph, which is kept: one row for each prediction (example or token).
        parameters: those to differentiate by.
        draws: how many sets of labels to average over, at least 1.
        generator: of the labels, on the logits' device; torch's default one if left out.
        loss_function: the mean negative log-likelihood of labels ``[N]`` under logits ``[N, C]``.

    Returns:
        One tensor for each parameter, of its shape, nowhere negative; zeros where the logits do not depend on it.

    Law:
        Unbiased for the batch's diagonal where `loss_function` is the likelihood that labels are drawn from: not with
        label smoothing or class weights. Gradients are squared, so those of converted layers must be exact: run the
        forward pass under ``handle.exact()``. Cost: one backward pass a draw.

    Raises:
        LossError: if the logits have no graph, or fewer than two axes.
        BudgetError: if `draws` is no positive whole number.
        ArgumentError: as for `estimate_hessian_diagonal`.
        StochasticModelError: if the logits' gradient is sketched, whose square would add its variance.
        NonFiniteCurvatureError: if a gradient is not finite.

    Example:
        >>> weight = torch.zeros(2, 3, requires_grad=True)
        >>> inputs = torch.ones(1, 2)
        >>> estimate_gauss_newton_diagonal(inputs @ weight, [weight], draws=3)[0].shape
        torch.Size([2, 3])

    References:
        Sophia, arXiv:2305.14342, where it is multiplied by the number of predictions as here.
    """
    check_count("draws", draws)
    check_instance("logits", logits, Tensor, "pass the model's output")
    if logits.ndim < 2 or not logits.requires_grad:
        raise LossError(
            f"logits must be [..., C] with a graph, but got the shape {tuple(logits.shape)}, requires_grad="
            f"{logits.requires_grad}; pass the model's output, outside of torch.no_grad()"
        )
    _check_exact(logits)
    rows_NC = logits.reshape(-1, logits.shape[-1])
    parameters = _list_parameters(parameters)
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    probabilities_NC = rows_NC.detach().softmax(1)
    if not torch.isfinite(probabilities_NC).all():
        raise NonFiniteCurvatureError("the logits are not finite, so no labels can be drawn; look at the model")
    for _ in range(draws):
        labels_N = torch.multinomial(probabilities_NC, 1, generator=generator).squeeze(1)
        loss = loss_function(rows_NC, labels_N)
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for total, gradient in zip(totals, gradients, strict=True):
            if gradient is not None:
                total += len(rows_NC) / draws * gradient.square()
    _check_finite(totals)
    return totals


def _list_parameters(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the parameters; a single tensor is refused, whose rows autograd takes for tensors of no graph."""
    found = [] if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable) else list(parameters)
    if not found or not all(isinstance(parameter, Tensor) for parameter in found):
        raise ArgumentError(
            "parameters must be tensors to differentiate by, at least one, but got "
            f"{describe_value(parameters)}; use [tensor], or list(model.parameters())"
        )
    fixed = [index for index, parameter in enumerate(found) if not parameter.requires_grad]
    if fixed:
        raise ArgumentError(
            f"parameter {fixed[0]} of shape {tuple(found[fixed[0]].shape)} does not require grad, so nothing can be "
            "differentiated by it; leave it out, or use requires_grad_() before the forward pass"
        )
    return found


def _check_exact(logits: Tensor) -> None:
    """Raise `StochasticModelError` if a converted layer has drawn on the way to the logits."""
    functions = [getattr(type(node), "_forward_cls", type(node)) for node in walk_graph([logits])]
    sketched = sum(function.__module__.startswith(_SKETCHED) for function in functions)
    if sketched:
        raise StochasticModelError(
            f"{sketched} layers on the way to the logits have sketched gradients, and the square of one is too "
            "large by its variance; run the forward pass under `with handle.exact():`"
        )


def _draw_signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    signs = torch.randint(0, 2, like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return 2 * signs - 1


def _check_loss(loss: Tensor) -> None:
    if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.requires_grad:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise LossError(
            f"loss must be a scalar with a graph, but got {shape}, requires_grad="
            f"{getattr(loss, 'requires_grad', False)}; call this before backward(), outside of torch.no_grad()"
        )


def _check_finite(totals: list[Tensor]) -> None:
    for index, total in enumerate(totals):
        if not torch.isfinite(total).all():
            raise NonFiniteCurvatureError(
                f"{int((~torch.isfinite(total)).sum())} entries of the diagonal of parameter {index} are not finite; "
                "look at the loss, or use float64"
            )
