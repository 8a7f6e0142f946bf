"""The backward pass of a chain: through all of its stages, on one draw of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.ops._guards import differentiate_once, refuse_forward_mode
from cheapgrad.ops.chains.stage import AbstractOpenedStage, AbstractStage, KeptRows
from cheapgrad.ops.chains.watching import Watch, is_asked_for
from cheapgrad.sketch import AbstractStrategy, Moment, Operands
from cheapgrad.sketch._row_sampling import AbstractRowSampling
from cheapgrad.sketch.selection import Selection

# Where a node of the autograd graph carries the chain of the tensor it made. Not on the tensor, which may be pickled.
KEY = "cheapgrad_chain"


@dataclass(frozen=True)
class Layout:
    """The static half of a chain: how the flat list of tensors is to be read."""

    stages: tuple[AbstractStage, ...]
    parameter_counts: tuple[int, ...]
    record_counts: tuple[int, ...]
    cotangent: AbstractStrategy | None
    examples: int
    passed: tuple[Watch, ...]

    def split_parameters(self, flat: tuple[Tensor | None, ...]) -> list[tuple[Tensor | None, ...]]:
        """Return the parameters of each stage."""
        return _split(flat, self.parameter_counts)

    @property
    def draws(self) -> bool:
        """Whether rows are drawn: sampled rows save products only."""
        return self.cotangent is not None and any(stage.multiplies for stage in self.stages)


def _split(flat: tuple[Any, ...], counts: tuple[int, ...]) -> list[tuple[Any, ...]]:
    parts, start = [], 0
    for count in counts:
        parts.append(tuple(flat[start : start + count]))
        start += count
    return parts


class _ChainFunction(torch.autograd.Function):
    """Forward runs the last stage; backward runs all of them on the kept rows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, root: Tensor, layout: Layout, *tensors: Tensor | None) -> Tensor:
        parameters = layout.split_parameters(tensors[: sum(layout.parameter_counts)])[-1]
        return layout.stages[-1].forward(x, parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, root, layout, *tensors = inputs
        ctx.layout = layout
        ctx.input_shapes = x.shape, root.shape
        ctx.input_dtypes = x.dtype, root.dtype
        # The record of a last stage that holds its output is not among the inputs.
        ctx.save_for_backward(*tensors, *((output,) if layout.stages[-1].keeps_output else ()))
        if not torch.compiler.is_dynamo_compiling():
            ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        layout, needs = ctx.layout, ctx.needs_input_grad
        if grad is None:
            # A chain that passed over this node's output did its work.
            _release(ctx)
            return (None,) * len(needs)
        saved, stages = ctx.saved_tensors, len(layout.stages)
        _release(ctx)
        # Either through all stages to the root, or through the last one to its input.
        first = stages - 1 if _stops_at_input(ctx) else 0
        with torch.no_grad():
            grad_input, gradients = _pull_back(layout, saved, grad, needs, first)
            if grad_input is not None:
                shape, dtype = (inputs[0 if first else 1] for inputs in (ctx.input_shapes, ctx.input_dtypes))
                grad_input = grad_input.to(dtype).view(shape)
        causes = [tensor for tensor in saved if tensor is not None]
        outputs = [differentiate_once(value, "row-wise chain", grad, *causes) for value in (grad_input, *gradients)]
        of_inputs = (outputs[0], None) if first else (None, outputs[0])
        return (*of_inputs, None, *outputs[1:], *([None] * (len(needs) - 3 - sum(layout.parameter_counts))))


def _release(ctx: Any) -> None:
    holder = ctx.metadata.get(KEY)
    if holder is not None:
        holder.release()


def _stops_at_input(ctx: Any) -> bool:
    """Tell whether somebody wants to see the gradient of a tensor that the chain would pass over."""
    passed = ctx.layout.passed
    if not passed:
        return False
    if ctx.needs_input_grad[0]:
        return is_asked_for(passed, ctx)
    for watch in passed:
        watch.refuse_if_observed()
    return False


class _EagerChainFunction(_ChainFunction):
    """The same, refusing forward mode by name; compiled graphs take no Function that defines a jvp."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        refuse_forward_mode("row-wise chain")


def _pull_back(
    layout: Layout, saved: tuple[Tensor | None, ...], grad: Tensor, needs: tuple[bool, ...], first: int
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradient of the input of stage `first`, ``[N, I]``, and those of the parameters from there on."""
    count = sum(layout.parameter_counts)
    parameters = layout.split_parameters(saved[:count])
    wanted = _split(tuple(needs[3 : 3 + count]), layout.parameter_counts)
    records = _split(saved[count:], layout.record_counts)
    grad_NO = grad.reshape(-1, grad.shape[-1])
    selection = _draw(layout, grad_NO)
    index_K, watch = (None, None) if selection is None else (selection.index_K, selection.watch)
    rows = KeptRows(index_K, grad_NO.shape[0], watch)
    cotangent = grad_NO if selection is None else selection.apply(grad_NO, 0)
    opened = _open_stages(layout, records, parameters, rows)
    gradients: list[tuple[Tensor | None, ...]] = []
    for position in reversed(range(first, len(opened))):
        wants_input = needs[0 if first else 1] or any(any(flags) for flags in wanted[first:position])
        cotangent, of_stage = opened[position].pull_back(cotangent, (wants_input, *wanted[position]))
        gradients.insert(0, of_stage)
        if position == first or not wants_input or cotangent is None:
            gradients = [(None,) * layout.parameter_counts[before] for before in range(position)] + gradients
            break
    if selection is not None and cotangent is not None:
        cotangent = selection.lift(cotangent, 0)
    flat = [gradient for of_stage in gradients for gradient in of_stage]
    return (cotangent if needs[0 if first else 1] else None), flat


def _draw(layout: Layout, grad_NO: Tensor) -> Selection | None:
    strategy = layout.cotangent
    if not layout.draws or not isinstance(strategy, AbstractRowSampling):
        return None
    return strategy.select(Operands(Moment.COTANGENT, None, grad_NO, examples=layout.examples), grad_NO.shape[0])


def _open_stages(
    layout: Layout, records: list[tuple[Any, ...]], parameters: list[tuple[Any, ...]], rows: KeptRows
) -> list[AbstractOpenedStage]:
    opened: list[AbstractOpenedStage] = []
    for position, stage in enumerate(layout.stages):
        rebuild = opened[-1].output if position and layout.stages[position - 1].rebuilds_output else None
        opened.append(stage.open(records[position], parameters[position], rows, rebuild))
    return opened


def apply_last_stage(x: Tensor, root: Tensor, layout: Layout, tensors: list[Tensor | None]) -> Tensor:
    """Return the output of a chain's last stage, whose backward pass goes through all of them.

    Args:
        x: input of the last stage.
        root: stands for the input of the first one.
        layout: says how `tensors` are to be read.
        tensors: parameters of all stages, then their records.
    """
    function = _ChainFunction if torch.compiler.is_dynamo_compiling() else _EagerChainFunction
    return function.apply(x, root, layout, *tensors)
