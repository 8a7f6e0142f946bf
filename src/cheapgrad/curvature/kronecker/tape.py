"""One forward pass, with what every layer was called on, and the way back from outputs to layers."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor, nn

from cheapgrad.curvature.kronecker.finite import check_finite
from cheapgrad.curvature.kronecker.layers import AbstractLayer, Use
from cheapgrad.curvature.kronecker.problem import Problem
from cheapgrad.curvature.kronecker.rows import AbstractRows, join_rows
from cheapgrad.curvature.operators.batches import Batch
from cheapgrad.curvature.operators.execution import (
    check_deterministic,
    differentiable_mode,
    explain_failure,
    refuse_draws,
)
from cheapgrad.errors import BatchError, LossError, NonFiniteCurvatureError, UnsupportedModelError, describe_value


@final
class Tape:
    """The rows of every layer in one forward pass.

    Attributes:
        outputs: of the model, detached, ``[B, ..., C]``.
        rows: by layer name.
    """

    def __init__(self, problem: Problem, outputs: Tensor, uses: dict[str, list[Use]]) -> None:
        self.outputs = outputs.detach()
        self.rows: dict[str, AbstractRows] = {
            name: join_rows([use.rows for use in calls]) for name, calls in uses.items()
        }
        self._problem, self._live_outputs, self._uses = problem, outputs, uses

    def pull_back(self, cotangent: Tensor) -> dict[str, Tensor]:
        """Return the cotangents ``[Q, B, T, O]`` of every layer's outputs, by name, for one of the model's outputs."""
        targets = [use.output for calls in self._uses.values() for use in calls]
        grads = iter(
            torch.autograd.grad(self._live_outputs, targets, cotangent, retain_graph=True, materialize_grads=True)
        )
        return {
            layer.name: torch.cat([layer.read_cotangent(use, next(grads)) for use in self._uses[layer.name]], 2)
            for layer in self._problem.layers
        }

    def check_gradients(self) -> None:
        """Compare the gradients that rows and cotangents make with those of autograd, once.

        Raises:
            UnsupportedModelError: naming a layer that does more with its parameters than its rows show: a
                parametrisation, a subclass with a forward of its own, a weight that is also used elsewhere.
            NonFiniteCurvatureError: if a gradient is not finite.
        """
        problem = self._problem
        parameters = dict(problem.model.named_parameters())
        named = [name for name in problem.selection.names if parameters[name].requires_grad]
        if not named:
            return
        # Neither constant nor symmetric, so that no layer's gradient vanishes by chance.
        count = self.outputs.numel()
        cotangent = torch.cos(torch.arange(count, dtype=self.outputs.dtype, device=self.outputs.device))
        cotangent = cotangent.reshape(self.outputs.shape)
        truth = torch.autograd.grad(
            self._live_outputs,
            [parameters[name] for name in named],
            cotangent,
            retain_graph=True,
            materialize_grads=True,
        )
        expected = dict(zip(named, truth, strict=True))
        found = self.pull_back(cotangent)
        for layer in problem.layers:
            sums = layer.unpack(self.rows[layer.name].sum_gradients(found[layer.name]))
            for own, gradient in sums.items():
                _compare(layer, own, gradient, expected.get(f"{layer.name}.{own}" if layer.name else own))


@contextlib.contextmanager
def measuring(problem: Problem) -> Iterator[None]:
    """Run the model for curvature inside the context: stock code, deterministic layers only.

    Raises:
        StochasticModelError: for dropout or batch norm in training mode, and if the forward pass draws.
    """
    check_deterministic(problem.model)
    device = problem.selection.device
    with differentiable_mode(problem.model, device):
        yield


def record(problem: Problem, batch: Batch) -> Tape:
    """Run the model on a batch and return what its layers saw; hooks are gone when this returns or raises.

    Raises:
        UnsupportedModelError: if a layer with chosen parameters was not called as a module.
        BatchError: if the batch has no example.
        ForwardError: if the model raises; the message names the batch.
        LossError: if the outputs are no tensor ``[B, ..., C]``, or the targets do not fit them.
        TargetError: if targets that should be classes are none.
        NonFiniteCurvatureError: if they are not finite.
    """
    uses: dict[str, list[Use]] = {layer.name: [] for layer in problem.layers}
    examples = _count_examples(batch)
    with contextlib.ExitStack() as stack:
        for layer in problem.layers:
            hook = functools.partial(_note_use, layer, uses[layer.name], examples)
            handle = layer.module.register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(refuse_draws(problem.model, problem.selection.device))
        what = f"the forward pass of a {type(problem.model).__name__} on batch {batch.index}"
        with explain_failure(what, inputs=batch.inputs):
            outputs = problem.options.reader.run(problem.model, batch.inputs)
    _check_outputs(outputs, examples)
    _check_targets(problem, batch, outputs)
    silent = [f"{layer.name} ({type(layer.module).__name__})" for layer in problem.layers if not uses[layer.name]]
    if silent:
        raise UnsupportedModelError(
            f"{', '.join(silent)} was not called as a module in the forward pass, so nothing is known of its inputs "
            "(attention uses the weight of out_proj directly); leave it out with parameters=[...]"
        )
    return Tape(problem, outputs, uses)


def _note_use(
    layer: AbstractLayer,
    calls: list[Use],
    examples: int,
    _: nn.Module,
    args: tuple[Any, ...],
    kwargs: Any,
    output: Tensor,
) -> Tensor:
    x = args[0] if args else next(iter(kwargs.values()))
    if not output.requires_grad:
        output = output.detach().requires_grad_()
    calls.append(layer.read_use(x, output, examples))
    # What follows may change the tensor in place, and its cotangent would then be another.
    return output.clone()


def _count_examples(batch: Batch) -> int:
    values = batch.inputs
    items = values.values() if isinstance(values, dict) else values if isinstance(values, (tuple, list)) else [values]
    tensors = [value for value in items if isinstance(value, Tensor) and value.ndim]
    if not tensors or not tensors[0].shape[0]:
        raise BatchError(
            f"inputs must be a tensor with the examples along its first axis, at least one, or a tuple or dict of "
            f"those, but got {describe_value(tensors[0] if tensors else values)}"
        )
    return tensors[0].shape[0]


def _check_targets(problem: Problem, batch: Batch, outputs: Tensor) -> None:
    """Raise if targets do not fit the outputs, also where they have no part: zeros for each example stand for none."""
    targets = batch.targets
    if not isinstance(targets, Tensor):
        return
    if targets.ndim == 0 or len(targets) != len(outputs):
        raise LossError(
            f"batch {batch.index} has outputs of shape {tuple(outputs.shape)} but targets of shape "
            f"{tuple(targets.shape)}; give one target for each of the {len(outputs)} examples"
        )
    if targets.any():
        problem.likelihood.check_targets(outputs, targets)


def _check_outputs(outputs: Any, examples: int) -> None:
    if not isinstance(outputs, Tensor) or outputs.ndim < 2 or outputs.shape[0] != examples:
        came = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"type {type(outputs).__name__}"
        raise LossError(
            f"outputs for {examples} examples have to be a tensor [{examples}, ..., C], but came with {came}; "
            "use BatchReader(predict=...)"
        )
    if not torch.isfinite(outputs).all():
        raise NonFiniteCurvatureError(
            f"{int((~torch.isfinite(outputs)).sum())} of {outputs.numel()} outputs of the model are not finite; look "
            "at its parameters and inputs"
        )


def _compare(layer: AbstractLayer, own: str, found: Tensor, expected: Tensor | None) -> None:
    if expected is None:
        return
    check_finite(layer.name, f"gradient of {own!r}", expected)
    gap, size = float((found - expected).norm()), float(expected.norm())
    # Summed in another order: the square root of rounding is far from both an error of summation and a wrong formula.
    if not gap <= math.sqrt(torch.finfo(found.dtype).eps) * max(size, 1e-6) * 10:
        raise UnsupportedModelError(
            f"the gradient of {own!r} of layer {layer.name!r} ({type(layer.module).__name__}) is not that of its "
            f"inputs and outputs: they differ by {gap:.3g} at a norm of {size:.3g}; is the parameter used elsewhere, "
            "reparametrised, or the class one with a forward of its own? Leave it out with parameters=[...]"
        )
