"""How each context draws: ``runner(row, device)`` returns a function that gives fresh weight gradients."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from cheapgrad import approximate
from tests.contexts.table import Row

Draw = Callable[[int], Tensor]


def converted_model(row: Row, device: str) -> nn.Sequential:
    """Return the row's layer in a model of its own, converted."""
    model = row.layer.model().to(device)
    if row.layer.stock is not None:
        return model
    approximate(model, row.placement.rule(row.layer.pattern), skip_small=False)
    return model


def problem(row: Row, device: str) -> tuple[Tensor, Tensor]:
    """Return the identity input, which needs a gradient, and the diagonal cotangent."""
    return row.layer.identity_input().to(device).requires_grad_(), row.layer.diagonal_cotangent().to(device)


def draws_of(row: Row, device: str, model: nn.Module, run: Callable[[Tensor], Tensor]) -> Draw:
    """Return a function that runs forward and backward `count` times and stacks the weight gradients."""
    x, cotangent = problem(row, device)
    weight = model.get_parameter(row.layer.parameter)

    def draw(count: int) -> Tensor:
        gradients = []
        for _ in range(count):
            weight.grad = None
            output = run(x)
            output.backward(cotangent.to(output.dtype))
            gradients.append(weight.grad)
        return torch.stack(gradients)

    return draw


def eager(row: Row, device: str) -> Draw:
    """Draw by plain backward."""
    model = converted_model(row, device)
    return draws_of(row, device, model, model)


def compiled(backend: str) -> Callable[[Row, str], Draw]:
    """Draw from a compiled model, as one graph."""

    def runner(row: Row, device: str) -> Draw:
        torch._dynamo.reset()
        model = converted_model(row, device)
        return draws_of(row, device, model, torch.compile(model, backend=backend, fullgraph=True))

    return runner


def checkpointed(use_reentrant: bool) -> Callable[[Row, str], Draw]:
    """Draw through activation checkpointing."""

    def runner(row: Row, device: str) -> Draw:
        model = converted_model(row, device)
        return draws_of(row, device, model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant))

    return runner


def per_sample(row: Row, device: str) -> Draw:
    """Draw the gradients of many copies of the problem at once, as per-sample gradients."""
    model = converted_model(row, device)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    x, cotangent = (tensor.detach() for tensor in problem(row, device))

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return (functional_call(model, parameters, (x,)) * cotangent).sum()

    def draw(count: int) -> Tensor:
        copies = x.expand(count, *x.shape)
        return vmap(grad(loss), in_dims=(None, 0), randomness="different")(parameters, copies)[row.layer.parameter]

    return draw


def autocast(row: Row, device: str) -> Draw:
    """Draw under autocast, forward only, as training loops do."""
    model = converted_model(row, device)

    def run(x: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return model(x)

    return draws_of(row, device, model, run)


def copied(duplicate: Callable[[Any], Any]) -> Callable[[Row, str], Draw]:
    """Draw from a copy of the converted model."""

    def runner(row: Row, device: str) -> Draw:
        model = duplicate(converted_model(row, device))
        return draws_of(row, device, model, model)

    return runner


def through_state_dict(row: Row, device: str) -> Draw:
    """Draw after the parameters went to a plain model's state_dict and back, by way of a file."""
    plain, model = row.layer.model().to(device), converted_model(row, device)
    plain.load_state_dict(model.state_dict())
    buffer = io.BytesIO()
    torch.save(plain.state_dict(), buffer)
    buffer.seek(0)
    model.load_state_dict(torch.load(buffer, weights_only=True))
    return draws_of(row, device, model, model)


RUNNERS: dict[str, Callable[[Row, str], Draw]] = {
    "eager": eager,
    "aot_eager": compiled("aot_eager"),
    "inductor": compiled("inductor"),
    "checkpoint": checkpointed(use_reentrant=False),
    "reentrant": checkpointed(use_reentrant=True),
    "vmap": per_sample,
    "autocast": autocast,
    "deepcopy": copied(copy.deepcopy),
    "pickle": copied(lambda model: pickle.loads(pickle.dumps(model))),
    "state_dict": through_state_dict,
}
