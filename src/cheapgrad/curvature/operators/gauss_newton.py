"""The generalised Gauss–Newton matrix."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from cheapgrad.curvature.operators.batches import Batch
from cheapgrad.curvature.operators.execution import check_twice_differentiable
from cheapgrad.curvature.operators.sandwich import AbstractSandwich, OutputProduct


@final
class GaussNewton(AbstractSandwich):
    """The generalised Gauss–Newton matrix ``G = (1/N) Σ_n J_nᵀ (∂²ℓ_n/∂f²) J_n``, by its products.

    The Hessian without the curvature of the model itself; positive semi-definite where the loss is convex in the
    outputs, and the Fisher matrix of the model's own distribution for cross-entropies and squared errors.

    Args:
        model: called as `reader` says, in eval mode if it has dropout or batch norms. Converted layers are exact here.
        loss: ``loss(outputs, targets) -> scalar``, the mean over the examples of a batch; its second derivative at the
            outputs is taken by autograd.
        batches: one pair ``(inputs, targets)``, one dict, or an iterable of them that can be gone through repeatedly.
        parameters: names of parameters or modules, or tensors; None for all that require grad.
        reader: how a batch is read (`BatchReader`), and where batches are spread over processes.

    Law:
        Exact up to rounding. A product costs about 1.9 gradients, see the page on products.

    Raises:
        StochasticModelError: if a layer draws, or depends on the batch as a whole.
        UnsupportedModelError: if PyTorch lacks a derivative.
        LossError: if the loss is no scalar mean, or the outputs are not one tensor.
        BatchError: if batches are of no known form, or their terms do not count alike.
        ForwardError: if the model or the loss raises; the message names the batch.
        UnknownNameError: if a parameter is not the model's.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.zeros(2, 1)
        >>> GaussNewton(model, torch.nn.MSELoss(), (x, y)) @ torch.ones(2)
        tensor([1., 9.])

    References:
        Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, Neural Computation 2002.
        Martens, New insights and perspectives on the natural gradient method, JMLR 2020.
    """

    def _metric(self, outputs: Tensor, batch: Batch) -> OutputProduct:
        held = outputs.requires_grad_()
        loss = self._evaluate_loss(held, batch)
        check_twice_differentiable(self._model, [loss])
        (cotangent,) = torch.autograd.grad(loss, held, create_graph=True, materialize_grads=True)
        if not cotangent.requires_grad:
            return torch.zeros_like

        def multiply(tangent: Tensor) -> Tensor:
            return torch.autograd.grad(cotangent, held, tangent, retain_graph=True, materialize_grads=True)[0]

        return multiply
