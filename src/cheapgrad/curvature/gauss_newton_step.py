"""The exact Gauss-Newton step through a system of the size of the batch's outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cheapgrad.curvature.conjugate_gradient import check_damping
from cheapgrad.curvature.operators.execution import (
    check_deterministic,
    differentiable_mode,
    explain_failure,
    refuse_draws,
)
from cheapgrad.errors import BatchError, NonFiniteCurvatureError, ShapeError, SingularCurvatureError, check_instance


def solve_gauss_newton(jacobian_BCP: Tensor, hessian_BCC: Tensor, gradient_BC: Tensor, *, damping: float) -> Tensor:
    """Return ``δ = -(Jᵀ Q J / B + damping)⁻¹ Jᵀ r / B`` from a system of B·C equations in place of P.

    By the identity of Duncan and Guttman, ``δ = -Jᵀ (Q J Jᵀ + B damping)⁻¹ r``.

    Args:
        jacobian_BCP: J, of every output by every parameter, ``[B, C, P]``.
        hessian_BCC: Q, of each example's loss by its outputs, ``[B, C, C]``; symmetric.
        gradient_BC: r, of each example's loss by its outputs, ``[B, C]``.
        damping: positive: without it the small system is singular wherever Q is.

    Returns:
        The step ``[P]`` for the mean loss over the batch.

    Law:
        Exact up to rounding. Cost: ``B² C² P`` multiplications for ``J Jᵀ``, ``(B C)³`` for the solve, a Jacobian in
        memory: for batches whose B·C is well below P. Curvature and gradient are those of one batch, so the step
        over-fits that batch: as with every Newton step, damp it, or take magnitudes from another batch.

    Raises:
        ShapeError: if the shapes do not fit.
        BudgetError: if the damping is negative.
        SingularCurvatureError: if the damping is zero, or the system is singular all the same.
        NonFiniteCurvatureError: if an input is not finite.

    Example:
        >>> jacobian = torch.tensor([[[1.0, 2.0, 0.0]]])  # one example, one output, three parameters
        >>> solve_gauss_newton(jacobian, torch.ones(1, 1, 1), torch.tensor([[3.0]]), damping=1.0)
        tensor([-0.5000, -1.0000, -0.0000])

    References:
        arXiv:2405.14402 for the step; Duncan (1944) and Guttman (1946) for the identity.
    """
    B, C, P = _check_shapes(jacobian_BCP, hessian_BCC, gradient_BC)
    check_damping(damping)
    if damping == 0:
        raise SingularCurvatureError(
            f"damping=0.0 leaves the system of {B * C} equations singular wherever the loss is flat in its outputs; "
            "use e.g. damping=1e-3"
        )
    rows_NP = jacobian_BCP.reshape(B * C, P)
    gram_BCN = (rows_NP @ rows_NP.T).reshape(B, C, B * C)
    system_NN = (hessian_BCC @ gram_BCN).reshape(B * C, B * C)
    system_NN.diagonal().add_(B * damping)
    solution_N, failed = torch.linalg.solve_ex(system_NN, gradient_BC.reshape(B * C))
    if int(failed):
        raise SingularCurvatureError(
            f"the system of {B * C} equations is singular with damping={damping!r}; the loss's Hessian is not positive "
            "semi-definite, or the damping is too small for the dtype"
        )
    return -(rows_NP.T @ solution_N)


def gauss_newton_step(
    model: nn.Module,
    loss_function: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    *,
    damping: float,
) -> dict[str, Tensor]:
    """Return the exact Gauss-Newton step of one batch for all parameters that need a gradient.

    Args:
        model: in evaluation mode if it has dropout or batch norms. Converted layers are exact here.
        loss_function: loss of **one** example: ``(output [C], target) -> scalar``; the batch's loss is the mean.
        inputs: ``[B, ...]``.
        targets: ``[B, ...]``.
        damping: positive.

    Returns:
        The step by parameter name: add it to the parameters.

    Law:
        That of `solve_gauss_newton`; outputs of more than one axis are flattened. Cost besides: B·C backward passes,
        vectorised.

    Raises:
        ArgumentError: if the model is none, or inputs and targets are no tensors.
        BatchError: if there is no example, or not one target for each.
        ForwardError: if the model or the loss raises.
        ShapeError: if `loss_function` does not return a scalar for one example.
        StochasticModelError: for dropout or batch norm in training mode, or if the forward pass draws.
        BudgetError: if the damping is negative.
        SingularCurvatureError: if the damping is zero, or too small for the dtype.
        NonFiniteCurvatureError: if outputs or their derivatives are not finite.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> inputs, targets = torch.eye(2), torch.tensor([[1.0], [2.0]])
        >>> step = gauss_newton_step(model, lambda y, t: (y - t).square().sum(), inputs, targets, damping=1e-6)
        >>> with torch.no_grad():
        ...     model.weight += step["weight"]
        >>> bool((model(inputs) - targets).abs().max() < 1e-3)
        True
    """
    _check_batch(model, inputs, targets)
    check_deterministic(model)
    parameters = {name: each.detach() for name, each in model.named_parameters() if each.requires_grad}

    def outputs_of(values: dict[str, Tensor], example: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (example.unsqueeze(0),)).squeeze(0)

    with differentiable_mode(model, inputs.device):
        what = f"the forward pass of a {type(model).__name__} on single examples"
        with torch.no_grad(), refuse_draws(model, inputs.device), explain_failure(what, inputs=inputs):
            outputs = torch.stack([outputs_of(parameters, example) for example in inputs])
        with explain_failure("the loss of the first example", output=outputs[0], target=targets[0]):
            loss = loss_function(outputs[0], targets[0])
        if loss.ndim != 0:
            raise ShapeError(
                f"loss_function must return the scalar loss of one example, but got the shape {tuple(loss.shape)} for "
                f"an output of shape {tuple(outputs.shape[1:])}; sum over outputs"
            )
        gradient = torch.func.vmap(torch.func.grad(loss_function))(outputs, targets)
        hessian = torch.func.vmap(torch.func.hessian(loss_function))(outputs, targets)
        jacobians = torch.func.vmap(torch.func.jacrev(outputs_of), in_dims=(None, 0))(parameters, inputs)
    B, C = len(inputs), outputs[0].numel()
    jacobian_BCP = torch.cat([each.reshape(B, C, -1) for each in jacobians.values()], -1)
    step = solve_gauss_newton(jacobian_BCP, hessian.reshape(B, C, C), gradient.reshape(B, C), damping=damping)
    pieces = step.split([each.numel() for each in parameters.values()])
    return {name: piece.view_as(parameters[name]) for name, piece in zip(parameters, pieces, strict=True)}


def _check_batch(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    check_instance("model", model, nn.Module)
    for name, value in (("inputs", inputs), ("targets", targets)):
        check_instance(name, value, Tensor)
    if inputs.ndim == 0 or targets.ndim == 0 or not len(inputs) or len(inputs) != len(targets):
        raise BatchError(
            "inputs and targets must have the same number of examples, at least one, along their first axes, but got "
            f"the shapes {tuple(inputs.shape)} and {tuple(targets.shape)}"
        )


def _check_shapes(jacobian_BCP: Tensor, hessian_BCC: Tensor, gradient_BC: Tensor) -> tuple[int, int, int]:
    if jacobian_BCP.ndim != 3:
        raise ShapeError(f"the Jacobian must have the shape [B, C, P], but got {tuple(jacobian_BCP.shape)}")
    B, C, P = jacobian_BCP.shape
    for name, tensor, shape in (("Hessian", hessian_BCC, (B, C, C)), ("gradient", gradient_BC, (B, C))):
        if tuple(tensor.shape) != shape:
            raise ShapeError(
                f"the loss's {name} must have the shape {shape} for a Jacobian of shape {(B, C, P)}, but got "
                f"{tuple(tensor.shape)}"
            )
    for name, tensor in (("Jacobian", jacobian_BCP), ("Hessian", hessian_BCC), ("gradient", gradient_BC)):
        if not torch.isfinite(tensor).all():
            raise NonFiniteCurvatureError(
                f"{int((~torch.isfinite(tensor)).sum())} entries of the {name} are not finite; look at the loss"
            )
    return B, C, P
