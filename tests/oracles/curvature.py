"""Dense curvature matrices by brute force, with torch.func and loops; nothing of cheapgrad."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev

Predict = Callable[[Callable[..., Any]], Tensor]


def flat_outputs(model: nn.Module, names: list[str], predict: Predict) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return outputs as a function of the named parameters in one vector, and that vector."""
    named = dict(model.named_parameters())
    start_P = torch.cat([named[name].detach().reshape(-1) for name in names])

    def outputs_of(vector_P: Tensor) -> Tensor:
        pieces = vector_P.split([named[name].numel() for name in names])
        values = {name: piece.reshape(named[name].shape) for name, piece in zip(names, pieces, strict=True)}
        return predict(lambda *args, **kwargs: functional_call(model, values, args, kwargs))

    return outputs_of, start_P


def dense_hessian(outputs_of: Callable[[Tensor], Tensor], loss: Callable[[Tensor], Tensor], at_P: Tensor) -> Tensor:
    """Return ∂²loss/∂θ².

    Not by torch.func.hessian, whose `jacrev` of a scalar gives wrong second derivatives of layer norm's weight.
    """
    gradient_of = grad(lambda vector_P: loss(outputs_of(vector_P)))
    units_PP = torch.eye(at_P.numel(), dtype=at_P.dtype)
    return torch.stack([grad(lambda vector_P, unit=unit: gradient_of(vector_P) @ unit)(at_P) for unit in units_PP])


def dense_gauss_newton(
    outputs_of: Callable[[Tensor], Tensor], loss: Callable[[Tensor], Tensor], at_P: Tensor
) -> Tensor:
    """Return Jᵀ (∂²loss/∂f²) J."""
    outputs = outputs_of(at_P).detach()
    jacobian_DP = jacrev(lambda vector_P: outputs_of(vector_P).reshape(-1))(at_P)
    inner_DD = hessian(lambda flat_D: loss(flat_D.reshape(outputs.shape)))(outputs.reshape(-1))
    return jacobian_DP.T @ inner_DD @ jacobian_DP


def second_moment(gradients: list[Tensor]) -> Tensor:
    """Return the mean of g gᵀ, one at a time."""
    total = torch.zeros(gradients[0].numel(), gradients[0].numel(), dtype=gradients[0].dtype)
    for gradient in gradients:
        total += torch.outer(gradient, gradient)
    return total / len(gradients)


def per_example_gradients(model: nn.Module, loss: Callable[[Tensor, Any], Tensor], data: list[tuple]) -> list[Tensor]:
    """Return one flat gradient for each example, each from a batch of one."""
    parameters = list(model.parameters())
    gradients = []
    for inputs, targets in data:
        grads = torch.autograd.grad(loss(model(inputs), targets), parameters)
        gradients.append(torch.cat([grad.reshape(-1) for grad in grads]))
    return gradients


def exact_categorical_fisher(model: nn.Module, inputs: list[Tensor]) -> Tensor:
    """Return (1/N) Σ_n Σ_c p(c|x_n) g_n(c) g_n(c)ᵀ, each class in turn."""
    total: Any = 0
    for x in inputs:
        p_C = model(x).softmax(-1).reshape(-1)
        for label in range(p_C.numel()):
            (gradient,) = per_example_gradients(
                model, nn.functional.cross_entropy, [(x, torch.tensor([label], device=x.device))]
            )
            total = total + p_C[label].detach() * torch.outer(gradient, gradient)
    return total / len(inputs)
