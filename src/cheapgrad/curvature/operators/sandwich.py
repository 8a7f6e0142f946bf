"""Matrices of the form JᵀMJ: the Jacobian of the outputs around a metric on the outputs."""

from __future__ import annotations

import abc
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointError

from cheapgrad.curvature.operators.batches import Batch
from cheapgrad.curvature.operators.convolution import NativeConvolutions
from cheapgrad.curvature.operators.data import AbstractDataOperator, BatchProduct, stack_rows
from cheapgrad.curvature.operators.execution import is_missing_derivative
from cheapgrad.errors import LossError

OutputProduct = Callable[[Tensor], Tensor]


class AbstractSandwich(AbstractDataOperator):
    """``JᵀMJ`` with the Jacobian J of a batch's outputs; what M is makes the difference.

    One product is a forward pass that carries the directional derivative ``J v`` along, the product with M, and a
    backward pass. For several columns ``Jᵀw`` is held as a graph that is linear in w, so that each column is a pass
    through it and one through the outputs' graph.
    """

    @abc.abstractmethod
    def _metric(self, outputs: Tensor, batch: Batch) -> OutputProduct:
        """Return the product with M at these outputs; M is symmetric, and the same at every call."""

    # Whether forward mode may be tried: not again where it once failed.
    _goes_forward = True

    def _product_of(self, batch: Batch, rows_RP: Tensor) -> Tensor:
        if self._goes_forward and batch.index not in self._held and len(rows_RP) == 1:
            try:
                return stack_rows([self._multiply_forward(batch, rows_RP[0])])
            except (RuntimeError, NotImplementedError) as error:
                # Going back needs no forward mode, and is only a little slower. Checkpoints do not keep tangents.
                if not (is_missing_derivative(error) or isinstance(error, CheckpointError)):
                    raise
                self._goes_forward = False
        return super()._product_of(batch, rows_RP)

    def _linearize(self, batch: Batch) -> BatchProduct:
        leaves = self._leaves()
        inputs = list(leaves.values())
        with NativeConvolutions() as native:
            outputs = self._check_outputs(self._run(leaves, batch), batch)
            cotangent = torch.zeros_like(outputs, requires_grad=True)
            with native.from_zeros():
                pulled = torch.autograd.grad(outputs, inputs, cotangent, create_graph=True, allow_unused=True)
        metric = self._metric(outputs.detach(), batch)
        # Leaves that the outputs do not depend on.
        used = [index for index, tensor in enumerate(pulled) if tensor is not None]
        self._check_graph([pulled[index] for index in used])

        def multiply(vector_P: Tensor) -> Tensor:
            directions = list(self.split(vector_P).values())
            # Checkpoints run forward again in here, and have to run what they ran before.
            with NativeConvolutions():
                (tangent,) = torch.autograd.grad(
                    [pulled[index] for index in used],
                    cotangent,
                    grad_outputs=[directions[index] for index in used],
                    retain_graph=True,
                    materialize_grads=True,
                )
                return self._pull_back(outputs, metric(tangent), inputs, retain_graph=True)

        return multiply

    def _multiply_forward(self, batch: Batch, vector_P: Tensor) -> Tensor:
        """Return one product by forward-mode differentiation of the outputs."""
        leaves = self._leaves()
        directions = self.split(vector_P)
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(leaf, directions[name]) for name, leaf in leaves.items()}
            outputs, tangent = forward_ad.unpack_dual(self._check_outputs(self._run(duals, batch), batch))
        if tangent is None:
            return torch.zeros_like(vector_P)
        weights = self._metric(outputs.detach(), batch)(tangent.detach())
        return self._pull_back(outputs, weights, list(leaves.values()))

    def _pull_back(self, outputs: Tensor, weights: Tensor, leaves: list[Tensor], retain_graph: bool = False) -> Tensor:
        pulled = torch.autograd.grad(outputs, leaves, weights, retain_graph=retain_graph, materialize_grads=True)
        return self._selection.flatten(pulled)

    def _check_outputs(self, outputs: object, batch: Batch) -> Tensor:
        if not isinstance(outputs, Tensor):
            raise LossError(
                f"a {type(self).__name__} needs outputs that are one tensor, but the model returned a "
                f"{type(outputs).__name__}; pick it out with BatchReader(predict=lambda model, inputs: ...)"
            )
        return self._check_depends(outputs, batch)
