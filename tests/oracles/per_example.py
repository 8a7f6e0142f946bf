"""Per-example Jacobians and Gauss–Newton matrices by torch.func, in full."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def example_jacobians(model: nn.Module, inputs: Tensor, names: Sequence[str]) -> Tensor:
    """Return the Jacobians ``[B, outputs, P]`` of each example's flattened outputs, for named parameters in order."""
    everything = dict(model.named_parameters())
    chosen = {name: everything[name].detach() for name in names}

    def run(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).flatten()

    jacobians = torch.func.vmap(torch.func.jacrev(run), in_dims=(None, 0))(chosen, inputs)
    return torch.cat([jacobians[name].flatten(2) for name in names], -1)


def output_hessians(loss: Callable[[Tensor], Tensor], outputs: Tensor) -> Tensor:
    """Return the Hessians ``[B, outputs, outputs]`` of a loss of one example's outputs ``[..., C]``."""

    def flat(output: Tensor) -> Tensor:
        return loss(output.reshape(outputs.shape[1:]))

    return torch.func.vmap(torch.func.hessian(flat))(outputs.detach().flatten(1))


def gauss_newton(model: nn.Module, inputs: Tensor, loss: Callable[[Tensor], Tensor], names: Sequence[str]) -> Tensor:
    """Return ``mean over examples of Jᵀ H J``, ``[P, P]``, H the Hessian of the example's loss in its outputs."""
    jacobians = example_jacobians(model, inputs, names)
    hessians = output_hessians(loss, model(inputs))
    return torch.einsum("bop,bok,bkq->pq", jacobians, hessians, jacobians) / len(inputs)
