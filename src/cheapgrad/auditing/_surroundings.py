"""How an audit leaves everything as it was, and how its random numbers are seeded."""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from cheapgrad.convert.sketched_layer import SketchedLayer
from cheapgrad.seeding import seed_torch, torch_states_kept


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back what a step changes: parameters, gradients, buffers, estimates of layers, modes and random states.

    Hooks that wait for complete gradients, such as those of optimizers that step during backward, do not run inside.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch_states_kept())
        keepers = (_keep_host_states, _keep_parameters, _keep_gradients, _keep_buffers, _keep_modes, _keep_memories)
        for keep in keepers:
            stack.callback(keep(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every module of it back into its own afterwards."""
    put_back = _keep_modes(model)
    try:
        model.eval()
        yield
    finally:
        put_back()


def seed_all(seed: int) -> None:
    """Seed every generator that a forward pass may use: PyTorch's on all devices, Python's and NumPy's."""
    seed_torch(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % (1 << 32))


def make_seed(*parts: object) -> int:
    """Return a seed that is another for every other text of the parts."""
    return random.Random("/".join(map(str, parts))).getrandbits(62)


def _keep_host_states(model: nn.Module) -> Any:
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None

    def put_back() -> None:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)

    return put_back


def _keep_parameters(model: nn.Module) -> Any:
    aside = [(parameter, parameter._version, parameter.detach().clone()) for parameter in model.parameters()]

    def put_back() -> None:
        with torch.no_grad():
            for parameter, version, value in aside:
                if parameter._version != version:
                    parameter.copy_(value)

    return put_back


def _keep_gradients(model: nn.Module) -> Any:
    aside = []
    for parameter in model.parameters():
        hooks = parameter._post_accumulate_grad_hooks or {}
        aside.append((parameter, parameter.grad, hooks, dict(hooks)))
        parameter.grad = None
        hooks.clear()

    def put_back() -> None:
        for parameter, gradient, hooks, held in aside:
            parameter.grad = gradient
            hooks.update(held)

    return put_back


def _keep_buffers(model: nn.Module) -> Any:
    # By the dictionary that holds them: a forward pass may put new tensors in their places.
    aside = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]

    def put_back() -> None:
        with torch.no_grad():
            for holder, name, buffer, value in aside:
                holder[name] = buffer
                buffer.copy_(value)

    return put_back


def _keep_modes(model: nn.Module) -> Any:
    modes = [(module, module.training) for module in model.modules()]

    def put_back() -> None:
        for module, mode in modes:
            module.training = mode

    return put_back


def _keep_memories(model: nn.Module) -> Any:
    memories = [
        (memory, copy.copy(vars(memory)))
        for module in model.modules()
        if isinstance(module, SketchedLayer)
        for memory in (module._cheapgrad.plan.stored_memory, module._cheapgrad.plan.cotangent_memory)
        if memory is not None
    ]

    def put_back() -> None:
        for memory, state in memories:
            vars(memory).clear()
            vars(memory).update(state)

    return put_back
