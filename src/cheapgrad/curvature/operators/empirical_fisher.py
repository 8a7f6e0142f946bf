"""The empirical Fisher matrix: second moment of per-example gradients at the data's own targets."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from cheapgrad.curvature.operators.batches import Batch
from cheapgrad.curvature.operators.sandwich import AbstractSandwich, OutputProduct
from cheapgrad.errors import LossError


@final
class EmpiricalFisher(AbstractSandwich):
    """The second moment ``E = (1/N) Σ_n g_n g_nᵀ`` of per-example gradients ``g_n = ∂ℓ(f(x_n), y_n)/∂θ``.

    No per-example gradient is formed: ``E v`` takes ``g_n·v`` from one directional derivative of the outputs, and sums
    the weighted gradients in one backward pass.

    Args:
        model: called as `reader` says, in eval mode if it has dropout or batch norms. Its outputs have the examples
            along their first axis, and each depends on its own example only.
        loss: ``loss(outputs, targets) -> scalar``, the mean over the examples of a batch. Where an example has several
            terms (tokens), its loss is their mean, and its gradient the mean of theirs.
        batches: one pair ``(inputs, targets)``, one dict, or an iterable of them that can be gone through repeatedly.
        parameters: names of parameters or modules, or tensors; None for all that require grad.
        reader: how a batch is read (`BatchReader`), and where batches are spread over processes.

    Law:
        Exact up to rounding. It is not the Fisher matrix, whose targets are drawn from the model (`MonteCarloFisher`);
        the two agree only where the model fits the data's distribution. With class weights or ignored targets, a
        gradient is that of the example's part in its batch's mean loss, so the matrix belongs to that batch, and
        batches that differ in this are refused.

    Raises:
        StochasticModelError: if a layer draws, or depends on the batch as a whole.
        UnsupportedModelError: if PyTorch lacks a derivative.
        LossError: if the loss is no scalar mean, or the outputs are not one tensor with the examples in front.
        BatchError: if batches are of no known form, or their terms do not count alike.
        ForwardError: if the model or the loss raises; the message names the batch.
        UnknownNameError: if a parameter is not the model's.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> torch.nn.init.zeros_(model.weight).item()
        0.0
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [1.0]])
        >>> EmpiricalFisher(model, torch.nn.MSELoss(), (x, y)) @ torch.ones(1)  # gradients −2 and −4
        tensor([10.])

    References:
        Kunstner, Balles, Hennig, Limitations of the empirical Fisher approximation, NeurIPS 2019.
    """

    _sizes_mend_unequal_terms = False

    def _metric(self, outputs: Tensor, batch: Batch) -> OutputProduct:
        if outputs.ndim == 0:
            raise LossError(
                "an EmpiricalFisher needs outputs with the examples along their first axis, but the model returned a "
                "single number; return one output per example"
            )
        held = outputs.requires_grad_()
        (cotangent,) = torch.autograd.grad(self._evaluate_loss(held, batch), held, materialize_grads=True)
        examples, axes = outputs.shape[0], tuple(range(1, outputs.ndim))

        def multiply(tangent: Tensor) -> Tensor:
            # The mean loss has 1/N in each cotangent; the matrix has one 1/N for the two.
            slopes = cotangent * tangent
            slopes = slopes.sum(axes, keepdim=True) if axes else slopes
            return cotangent * slopes * examples

        return multiply
