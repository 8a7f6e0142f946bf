"""A method applied to a model: what takes steps, and what can switch the sketches off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import cheapgrad
from benchmarks.experiments.methods import Method
from benchmarks.experiments.tasks import Task
from benchmarks.watching import at_usual_keeps
from benchmarks.whole_network import Checkpointed
from cheapgrad.cost import measure_held_bytes, peak_memory
from cheapgrad.planning import NoiseSchedule

Batch = tuple[Tensor, Tensor]


@dataclass
class Prepared:
    """A model that a method has been applied to.

    Attributes:
        task: the task.
        method: the method.
        model: converted, wrapped or compiled.
        handle: of the conversion, if any.
        controller: of the handle, if any.
        remark: what a reader has to know.
    """

    task: Task
    method: Method
    model: nn.Module
    handle: cheapgrad.Handle | None = None
    controller: Any = None
    remark: str = ""

    def compute_loss(self, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        return self.task.compute_loss(self.model, *batch)

    def backward(self, batch: Batch, parts: int = 1) -> float:
        """Add the gradient of a batch's loss to the parameters, in micro-batches if asked, and return the loss."""
        examples, total = len(batch[1]), 0.0
        with self.compiler_budget():
            for inputs, labels in zip(batch[0].tensor_split(parts), batch[1].tensor_split(parts), strict=True):
                loss = self.compute_loss((inputs, labels)) * (len(labels) / examples)
                loss.backward()
                total += loss.item()
        return total

    def draw_gradient(self, batch: Batch) -> list[Tensor]:
        """Return one gradient of a batch's loss, the model's buffers left as they are."""
        buffers = [(buffer, buffer.detach().clone()) for buffer in self.model.buffers()]
        gradient = torch.autograd.grad(self.compute_loss(batch), list(self.model.parameters()))
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        return list(gradient)

    def unwatched(self) -> Any:
        """Hide from the controller, if there is one, what is measured inside the context."""
        if self.controller is None or self.handle is None:
            return contextlib.nullcontext()
        return at_usual_keeps(self.handle, self.controller)

    def compiler_budget(self) -> Any:
        """Set the compiler's activation memory budget inside the context, where the method has one."""
        if self.method.memory_budget is None:
            return contextlib.nullcontext()
        import torch._functorch.config as functorch_config

        return functorch_config.patch(activation_memory_budget=self.method.memory_budget)  # type: ignore[attr-defined]

    def measure_bytes(self, batch: Batch, parts: int = 1) -> tuple[int, int | None]:
        """Return bytes held for backward and the peak of a step beyond what was there, buffers left as they are.

        What is kept may depend on what a first step showed, so one goes before.
        """
        part = (batch[0].tensor_split(parts)[0], batch[1].tensor_split(parts)[0])
        with torch.random.fork_rng(devices=[]), self.compiler_budget(), self.unwatched():
            self.draw_gradient(part)
            held = measure_held_bytes(lambda: self.compute_loss(part), exclude=[self.model, *part]).total_bytes
            if self.method.memory_budget is not None:
                # The peak is followed operation by operation, and compiled code has none.
                return held, None
            return held, peak_memory(lambda: self.draw_gradient(part)).peak_bytes


def prepare(
    task: Task,
    method: Method,
    model: nn.Module,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer | None = None,
) -> Prepared:
    """Apply a method to a model in place; wrap or compile it where the method says so.

    Args:
        task: the task.
        method: the method.
        model: in training mode.
        batches: for methods that plan, at least 2.
        optimizer: for those that count noise in units of its steps; where they plan, it has taken some.

    Raises:
        CheapgradError: if the method does not fit the model.
    """
    prepared = Prepared(task, method, model)
    unit = optimizer if method.counts_in_steps else None
    if method.planned_flops is not None:
        found = cheapgrad.plan(
            model,
            lambda network, batch: task.compute_loss(network, *batch),
            batches,
            flops=method.planned_flops,
            skip_small=task.skip_small,
            optimizer=unit,
        )
        prepared.handle = cheapgrad.approximate(model, found)
        prepared.remark = f"planned noise {found.predicted.noise_fraction:.3g}"
    elif method.is_converted:
        rules = method.rules if method.make_rules is None else method.make_rules(model)
        prepared.handle = cheapgrad.approximate(model, rules, skip_small=task.skip_small and not method.converts_small)
    if method.controlled_noise is not None and prepared.handle is not None:
        schedule = NoiseSchedule(*method.controlled_noise, steps=max(1, task.steps))
        prepared.controller = cheapgrad.Controller(prepared.handle, noise=schedule, optimizer=unit)
    if method.checkpoints:
        model.blocks = nn.Sequential(*[Checkpointed(block) for block in model.blocks])  # type: ignore[union-attr]
    if method.memory_budget is not None:
        torch._dynamo.reset()
        prepared.model = torch.compile(model)  # type: ignore[assignment]
    return prepared


@contextlib.contextmanager
def exactly(prepared: Prepared) -> Iterator[None]:
    """Take exact gradients inside the context."""
    with prepared.handle.exact() if prepared.handle is not None else contextlib.nullcontext():
        yield
