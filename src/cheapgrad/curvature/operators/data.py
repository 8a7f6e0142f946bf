"""What the curvature matrices of a model on data share: parameters, batches, means over batches and processes."""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cheapgrad.curvature.operators.abstract import AbstractOperator, MicroBatch
from cheapgrad.curvature.operators.averaging import mean_over_batches, mean_over_processes
from cheapgrad.curvature.operators.batches import Batch, Batches, BatchReader
from cheapgrad.curvature.operators.execution import (
    check_deterministic,
    check_twice_differentiable,
    differentiable_mode,
    explain_failure,
    explain_missing,
    is_missing_derivative,
    refuse_draws,
)
from cheapgrad.curvature.operators.parameters import select_parameters
from cheapgrad.curvature.operators.snapshot import Snapshot
from cheapgrad.curvature.operators.unequal_terms import UnequalTerms
from cheapgrad.errors import BatchError, LossError, ModelTypeError, StaleGraphError, check_instance, describe_value

BatchProduct = Callable[[Tensor], Tensor]


class AbstractDataOperator(AbstractOperator):
    """A curvature matrix of a model's mean loss over batches, with respect to some of its parameters.

    Products run the model in the state it is in: parameters that have changed give the curvature where they are now.

    Args:
        model: called as `reader` says. Wrappers of DistributedDataParallel and torch.compile are looked through.
        loss: ``loss(outputs, targets) -> scalar``, the mean over the examples of a batch.
        batches: one pair ``(inputs, targets)``, one dict, or an iterable of them that can be gone through repeatedly.
        parameters: names of parameters or modules, or tensors; None for all that require grad.
        reader: how a batch is read and where batches are spread over processes.
    """

    # Whether a mean over batches by the number of their terms is the matrix of all terms together.
    _sizes_mend_unequal_terms = True

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        batches: Any,
        *,
        parameters: Iterable[str | Tensor] | None = None,
        reader: BatchReader | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ModelTypeError(f"model must be a torch.nn.Module, but got {describe_value(model)}")
        _check_loss(loss)
        self._model, self._loss = _unwrap(model), loss
        self._selection = select_parameters(self._model, parameters)
        self._reader = BatchReader() if reader is None else reader
        check_instance("reader", self._reader, BatchReader, "use BatchReader(...)")
        unequal = UnequalTerms(loss, self._reader.size is not None and self._sizes_mend_unequal_terms)
        self._batches = Batches(batches, self._reader, self._selection.device, unequal)
        self._forward = _Forward(self._model, self._reader)
        self._held: dict[int, BatchProduct] = {}
        self._snapshot: Snapshot | None = None
        self._has_checked_graph = False

    @property
    def shape(self) -> tuple[int, int]:
        """P rows and columns, the selected parameters' entries."""
        return self._selection.size, self._selection.size

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self._selection.dtype

    @property
    def device(self) -> torch.device:
        """The parameters' device."""
        return self._selection.device

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the parameters, in the order in which vectors hold them."""
        return self._selection.names

    @property
    def example_count(self) -> float:
        """The number of examples of all batches, on all processes; goes through the batches."""
        count = sum(batch.examples for batch in self._batches)
        group = self._reader.process_group
        if group is None:
            return count
        total = torch.tensor([count], dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total, group=group)
        return float(total)

    @property
    def micro_batches(self) -> tuple[MicroBatch, ...]:
        """One operator of the same kind per batch; they are held in memory, whatever iterable they came from.

        Over a process group, the i-th is the mean over all processes of their i-th batches.

        Raises:
            BatchError: if the processes of the group have different numbers of batches.
        """
        parts, singles = [], self._batches.singles()
        self._check_alike(len(singles))
        for batches in singles:
            part = copy.copy(self)
            part._batches = batches
            parts.append(part)
        counts = [part.example_count for part in parts]
        total = sum(counts)
        return tuple(MicroBatch(part, count / total, count) for part, count in zip(parts, counts, strict=True))

    def _check_alike(self, count: int) -> None:
        """Raise `BatchError` unless all processes have so many batches: a process without a partner waits for ever."""
        group = self._reader.process_group
        if group is None:
            return
        ends = torch.tensor([count, -count], device=self.device)
        torch.distributed.all_reduce(ends, op=torch.distributed.ReduceOp.MAX, group=group)
        most, least = int(ends[0]), -int(ends[1])
        if most != least:
            raise BatchError(
                f"the processes of the group have from {least} to {most} batches, this one {count}, so that the "
                "i-th of each cannot be put together; give all the same number"
            )

    def held_inputs(self) -> list[Any]:
        """Return the inputs of the micro-batches in memory; none where they come from a loader."""
        return self._batches.held_inputs()

    def split(self, vector_P: Tensor) -> dict[str, Tensor]:
        """Return views of a vector ``[P]`` by parameter name."""
        return self._selection.split(vector_P)

    def loss(self) -> float:
        """Return the mean loss over all batches."""
        return float(self._mean(lambda batch: self._loss_of(batch)[0].detach().reshape(1), None))

    def gradient(self) -> Tensor:
        """Return the gradient ``[P]`` of the mean loss over all batches, exact in every layer."""
        return self._mean(self._gradient_of, None)

    def linearized(self) -> AbstractDataOperator:
        """Return this matrix at the present parameters, with all that does not depend on the operand computed once.

        It holds the graph of a forward and a backward pass of every batch, and saves both in every product.

        Law:
            Products equal those of the operator. A parameter or buffer of the model that has been changed in place or
            replaced since, selected or not, makes the next product a `StaleGraphError`; a change in place through
            ``parameter.data`` goes unnoticed.
        """
        twin = copy.copy(self)
        twin._batches = self._batches.held()
        held: dict[int, BatchProduct] = {}

        def hold(batch: Batch) -> Tensor:
            held[batch.index] = self._linearize(batch)
            return torch.zeros(1)

        twin._mean(hold, None)
        twin._held, twin._snapshot = held, Snapshot(self._model)
        return twin

    def _multiply(self, columns_PR: Tensor) -> Tensor:
        if self._snapshot is not None:
            self._snapshot.check()
        rows_RP = columns_PR.T.contiguous()
        return self._mean(lambda batch: self._product_of(batch, rows_RP), columns_PR).T

    @abc.abstractmethod
    def _linearize(self, batch: Batch) -> BatchProduct:
        """Return the product of a batch's matrix with a vector ``[P]``, from a graph that is held.

        Called in a differentiable mode; so is what it returns.
        """

    def _check_graph(self, tensors: Sequence[Tensor]) -> None:
        """Refuse a graph that cannot be differentiated, the first time that there is one."""
        if not self._has_checked_graph:
            check_twice_differentiable(self._model, tensors)
            self._has_checked_graph = True

    def _product_of(self, batch: Batch, rows_RP: Tensor) -> Tensor:
        """Return the products ``[R, P]`` of a batch's matrix with the rows ``[R, P]``."""
        if batch.index in self._held:
            return stack_rows([_multiply_held(self._held[batch.index], row_P) for row_P in rows_RP])
        product = self._linearize(batch)
        return stack_rows([product(row_P) for row_P in rows_RP])

    def _mean(self, compute: Callable[[Batch], Tensor], operand: Tensor | None) -> Tensor:
        """Return the mean of what is computed for each batch, over all batches and processes."""
        check_deterministic(self._model)
        with differentiable_mode(self._model, self.device):
            try:
                mean, count = mean_over_batches(self._batches, compute)
            except (RuntimeError, NotImplementedError) as error:
                if is_missing_derivative(error):
                    raise explain_missing(self._model, error) from error
                raise
        return mean_over_processes(mean, count, operand, self._reader.process_group)

    def _leaves(self) -> dict[str, Tensor]:
        """Return the selected parameters as leaves of a new graph."""
        named = dict(self._model.named_parameters())
        return {name: named[name].detach().requires_grad_() for name in self._selection.names}

    def _run(self, values: dict[str, Tensor], batch: Batch) -> Any:
        """Run the model with `values` in place of the selected parameters and all others held fixed."""
        every = {f"model.{name}": tensor.detach() for name, tensor in self._model.named_parameters()}
        every |= {f"model.{name}": value for name, value in values.items()}
        what = f"the forward pass of a {type(self._model).__name__} on batch {batch.index}"
        with refuse_draws(self._model, self.device), explain_failure(what, inputs=batch.inputs):
            return functional_call(self._forward, every, (batch.inputs,))

    def _loss_of(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Return the loss of a batch, and the leaves of its graph."""
        leaves = self._leaves()
        loss = self._evaluate_loss(self._run(leaves, batch), batch)
        return self._check_depends(loss, batch), list(leaves.values())

    def _evaluate_loss(self, outputs: Any, batch: Batch) -> Tensor:
        with explain_failure(f"the loss of batch {batch.index}", outputs=outputs, targets=batch.targets):
            loss = self._loss(outputs, batch.targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise LossError(f"loss(outputs, targets) must return a scalar mean over examples, but returned {shape}")
        return loss.reshape(())

    def _gradient_of(self, batch: Batch) -> Tensor:
        loss, leaves = self._loss_of(batch)
        return self._selection.flatten(torch.autograd.grad(loss, leaves, materialize_grads=True))

    def _check_depends(self, result: Tensor, batch: Batch) -> Tensor:
        """Return a loss or outputs, unless they have no derivative."""
        if not result.requires_grad:
            raise LossError(
                f"what the model returns for batch {batch.index} does not depend on {', '.join(self.parameter_names)}; "
                "select others with parameters=[...], and do not run the model under no_grad"
            )
        return result


class _Forward(nn.Module):
    """Runs the model as the reader says, so that parameters can be replaced underneath a function."""

    def __init__(self, model: nn.Module, reader: BatchReader) -> None:
        super().__init__()
        self.model, self._reader = model, reader

    def forward(self, inputs: Any) -> Any:
        return self._reader.run(self.model, inputs)


def _check_loss(loss: Any) -> None:
    """Raise `LossError` unless the loss can be called and is, as far as it says, a mean over examples."""
    reduction = getattr(loss, "reduction", "mean")
    if not callable(loss) or reduction != "mean":
        what = f"a {type(loss).__name__}" + (f" with reduction={reduction!r}" if callable(loss) else "")
        raise LossError(f"loss must be a callable mean over examples, but got {what}; use reduction='mean'")


def _unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside of wrappers that only change how it is run."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _multiply_held(product: BatchProduct, row_P: Tensor) -> Tensor:
    try:
        return product(row_P)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise StaleGraphError(
            "a tensor of the graph has changed in place since linearized() was called, so it no longer holds; call "
            "linearized() again"
        ) from error


def stack_rows(products: list[Tensor]) -> Tensor:
    """Return vectors as the rows of a matrix, without a copy of a single one."""
    return products[0].unsqueeze(0) if len(products) == 1 else torch.stack(products)
