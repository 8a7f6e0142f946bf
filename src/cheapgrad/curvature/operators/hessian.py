"""The Hessian of a model's mean loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from cheapgrad.curvature.operators.batches import Batch
from cheapgrad.curvature.operators.convolution import NativeConvolutions
from cheapgrad.curvature.operators.data import AbstractDataOperator, BatchProduct


@final
class Hessian(AbstractDataOperator):
    """The Hessian ``H = ∂²L/∂θ²`` of the mean loss ``L(θ) = (1/N) Σ_n ℓ(f_θ(x_n), y_n)``, by its products.

    ``H v`` is the gradient of the number ``∇L·v``: a second backward pass through the graph of the gradient. Several
    columns share one graph. Reverse mode twice is the slower way on paper and the safe one in fact: the derivatives of
    some of PyTorch's forward-mode rules, such as layer norm's, are silently wrong (pytorch/pytorch issue 198017).

    Args:
        model: called as `reader` says, in eval mode if it has dropout or batch norms. Converted layers are exact here.
        loss: ``loss(outputs, targets) -> scalar``, the mean over the examples of a batch.
        batches: one pair ``(inputs, targets)``, one dict (then ``model(**batch)`` and ``loss(outputs, batch)``), or an
            iterable of them that can be gone through repeatedly. Their means are weighted by size.
        parameters: names of parameters or modules, or tensors; None for all that require grad.
        reader: how a batch is read (`BatchReader`), and where batches are spread over processes.

    Law:
        Exact up to rounding. A product costs two to four gradients, see the page on products.

    Raises:
        StochasticModelError: if a layer draws, or depends on the batch as a whole.
        UnsupportedModelError: if PyTorch lacks a second derivative.
        LossError: if the loss is no scalar mean.
        BatchError: if batches are of no known form, or their terms do not count alike.
        ForwardError: if the model or the loss raises; the message names the batch.
        UnknownNameError: if a parameter is not the model's.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.zeros(2, 1)
        >>> hessian = Hessian(model, torch.nn.MSELoss(), (x, y))
        >>> hessian @ torch.ones(2)
        tensor([1., 9.])

    References:
        Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 1994.
    """

    def _mean(self, compute: Callable[[Batch], Tensor], operand: Tensor | None) -> Tensor:
        with NativeConvolutions():
            return super()._mean(compute, operand)

    def _linearize(self, batch: Batch) -> BatchProduct:
        loss, leaves = self._loss_of(batch)
        gradients = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
        self._check_graph([loss, *gradients])
        # What is linear in the parameters has a gradient without a graph, and no curvature.
        curved = [index for index, gradient in enumerate(gradients) if gradient.requires_grad]

        def multiply(vector_P: Tensor) -> Tensor:
            if not curved:
                return torch.zeros_like(vector_P)
            directions = list(self.split(vector_P).values())
            product = torch.autograd.grad(
                [gradients[index] for index in curved],
                leaves,
                grad_outputs=[directions[index] for index in curved],
                retain_graph=True,
                materialize_grads=True,
            )
            return self._selection.flatten(product)

        return multiply
