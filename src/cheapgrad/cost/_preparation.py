"""What a scan checks before it runs, and how it leaves everything as it was."""

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from cheapgrad.cost._saved_tensors import list_owned_tensors, list_tensors
from cheapgrad.errors import (
    ArgumentError,
    FakeModelError,
    InputsError,
    MetaTensorError,
    ModelTypeError,
    describe_value,
)


def check_arguments(model: object, inputs: tuple[Any, ...], kwargs: dict[str, Any], fake: bool) -> None:
    """Refuse what cannot be scanned, before anything runs."""
    if not isinstance(model, nn.Module):
        raise ModelTypeError(
            f"scan needs a torch.nn.Module as its first argument, but got {describe_value(model)}; to scan a function, "
            "wrap it in a module"
        )
    try:
        inspect.signature(model.forward).bind(*inputs, **kwargs)
    except TypeError as error:
        raise InputsError(
            f"the inputs do not fit {type(model).__name__}.forward{inspect.signature(model.forward)}: {error}; got "
            f"{_count(len(inputs), 'positional input')} and {_count(len(kwargs), 'keyword')}{': ' * bool(kwargs)}"
            f"{', '.join(kwargs)}"
        ) from error
    except ValueError:
        # Built-in callables have no signature.
        pass
    if fake or not any(tensor.is_meta for tensor in (*list_owned_tensors([model]), *list_tensors((inputs, kwargs)))):
        return
    named = [*model.named_parameters(), *model.named_buffers()]
    named += [("an input", tensor) for tensor in list_tensors((inputs, kwargs))]
    for name, tensor in named:
        if tensor.is_meta:
            raise MetaTensorError(
                f"{name} is on the meta device and has no data; pass fake=True to scan without data, or move the model "
                "and its inputs to a device"
            )


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'s' * (number != 1)}"


def check_callable(name: str, value: object, advice: str) -> None:
    """Refuse what cannot be called where a function is needed."""
    if not callable(value):
        raise ArgumentError(f"{name} must be a function without arguments, but got {describe_value(value)}; {advice}")


def find_mistyped_options(model: nn.Module, kwargs: dict[str, Any], options: Iterable[str]) -> list[tuple[str, str]]:
    """Return keywords that the model takes whatever their name, with the option of ours that each resembles."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except ValueError:
        return []
    named = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    near = [(name, difflib.get_close_matches(name, options, n=1, cutoff=0.7)) for name in kwargs if name not in named]
    return [(name, found[0]) for name, found in near if found]


def detach_inputs(values: Any) -> Any:
    """Return the inputs cut off from the graph and the gradients of whoever made them."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().requires_grad_(tensor.requires_grad), values)


class Gradients:
    """The gradients that tensors held before a scan, put aside with the hooks that wait for new ones."""

    def __init__(self) -> None:
        self._aside: dict[int, tuple[Tensor, Tensor | None, dict[Any, Any]]] = {}

    def set_aside(self, tensors: Iterable[Tensor]) -> None:
        """Leave the tensors without gradient and without hooks that act when they get one, such as an optimizer's."""
        for tensor in tensors:
            if id(tensor) not in self._aside and tensor.is_leaf:
                hooks = tensor._post_accumulate_grad_hooks or {}
                self._aside[id(tensor)] = (tensor, tensor.grad, dict(hooks))
                tensor.grad = None
                hooks.clear()

    def put_back(self) -> None:
        """Give all tensors back what they had."""
        for tensor, gradient, hooks in self._aside.values():
            tensor.grad = gradient
            if hooks:
                tensor._post_accumulate_grad_hooks.update(hooks)  # type: ignore[union-attr] - it was not empty


@contextlib.contextmanager
def undisturbed(model: nn.Module, values: object) -> Iterator[Gradients]:
    """Run eagerly and with gradients inside; put gradients, buffers and random states back afterwards."""
    owned = list_owned_tensors([model])
    generators = list({tensor.device for tensor in (*owned, *list_tensors(values)) if tensor.is_cuda})
    gradients = Gradients()
    gradients.set_aside(owned)
    # Batch norms count the batches they see.
    buffers = [(buffer, buffer.detach().clone()) for buffer in owned if _is_writable_buffer(buffer)]
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.random.fork_rng(generators),
            torch.compiler.set_stance("force_eager"),
        ):
            yield gradients
    finally:
        gradients.put_back()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _is_writable_buffer(tensor: Tensor) -> bool:
    """Tell a buffer that a forward pass may write to in place."""
    if isinstance(tensor, nn.Parameter) or is_lazy(tensor):
        return False
    # Of expanded ones several entries are one, and PyTorch refuses to write to them.
    return not any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def has_compiled_parts(modules: Iterable[nn.Module]) -> bool:
    """Tell whether `torch.compile` was called on one of the modules."""
    modules = list(modules)
    wrapped = any(kind.__module__ == "torch._dynamo.eval_frame" for kind in set(map(type, modules)))
    return wrapped or any(module._compiled_call_impl is not None for module in modules)


@contextlib.contextmanager
def fake_copies(
    model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """Yield the model and its inputs without data, and run what is inside without computing anything."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise FakeModelError(
                f"{name} has no shape before the model's first batch, and a copy without data cannot give it one; run "
                "the model once, or scan it without fake=True"
            )
    # Tensors that a module keeps outside of its parameters and buffers are faked when they meet a fake one.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    devices = [tensor.device for tensor in list_tensors((inputs, kwargs)) if tensor.device.type != "meta"]
    device = devices[0] if devices else torch.device("cpu")

    def make_fake(tensor: Tensor) -> Tensor:
        if tensor.device.type != "meta" or isinstance(tensor, FakeTensor):
            return mode.from_tensor(tensor, static_shapes=True)
        with torch.no_grad():
            fake = FakeTensor(mode, tensor.detach(), device)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, tensor.requires_grad)
        return fake.requires_grad_(tensor.requires_grad)

    # What the copy is told to have copied already, it takes over as it is.
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in list_tensors([module._parameters, module._buffers, list(vars(module).values())]):
            if id(tensor) not in memo:
                memo[id(tensor)] = make_fake(tensor)
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise FakeModelError(
            f"fake=True scans a copy of the model without data, but copying {type(model).__name__} raised "
            f"{type(error).__name__}: {error}; scan it without fake=True"
        ) from error
    inputs, kwargs = tree_map_only(Tensor, make_fake, (inputs, kwargs))
    with mode:
        yield copied, inputs, kwargs
