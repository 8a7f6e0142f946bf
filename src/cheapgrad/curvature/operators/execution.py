"""How a model is run for curvature: exactly, deterministically, and with operations that have second derivatives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointError

from cheapgrad.errors import CheapgradError, ForwardError, StochasticModelError, UnsupportedModelError, describe_value
from cheapgrad.exactness import forced_exact

_DROPOUTS = nn.modules.dropout._DropoutNd
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
# What PyTorch says where an operation lacks the derivative that was asked for, or its formula cannot be differentiated.
_MISSING = (
    "forward ad with",
    "derivative for",
    "differentiate twice",
    "once_differentiable",
    "double backward",
    "modified by an inplace operation",
    "not implemented for",
    "implement the jvp",
)
# What PyTorch wraps the backward passes in that it marks.
_MARKED = torch.autograd.function.once_differentiable(lambda ctx: None).__code__


@contextlib.contextmanager
def differentiable_mode(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Run stock, eager, differentiable code inside the context, backward passes included.

    Converted layers are exact; compiled models run eagerly and attention runs by its plain formula, because neither the
    compiled nor the fused kernels have second derivatives; so do recurrent layers on CUDA, without cuDNN.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(forced_exact())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.enable_grad())
        if device.type == "cuda" and any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


@contextlib.contextmanager
def refuse_draws(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Raise `StochasticModelError` if what runs inside moved torch's random state."""
    before = _random_state(device)
    yield
    if not torch.equal(before, _random_state(device)):
        raise StochasticModelError(
            f"the forward pass of a {type(model).__name__} draws random numbers, so its curvature is another at every "
            "call; call model.eval(), or set the dropout of attention and recurrent layers to 0"
        )


@contextlib.contextmanager
def explain_failure(what: str, **values: Any) -> Iterator[None]:
    """Turn an error of the user's model or loss into one that says where it happened and on what.

    Args:
        what: ran inside, e.g. ``"the loss of batch 3"``.
        values: that it ran on, by the words for them.

    Raises:
        ForwardError: with the original as its cause. Our own errors, missing derivatives, which others explain, and
            exhausted memory pass as they are.
    """
    try:
        yield
    except (CheapgradError, CheckpointError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if is_missing_derivative(error):
            raise
        shapes = ", ".join(f"{name}: {_describe_shapes(value)}" for name, value in values.items())
        raise ForwardError(f"{what} raised {type(error).__name__}: {error} ({shapes})") from error


def _describe_shapes(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_describe_shapes(item)}" for key, item in value.items())
    if isinstance(value, (tuple, list)):
        return ", ".join(_describe_shapes(item) for item in value)
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else describe_value(value)


def check_deterministic(model: nn.Module) -> None:
    """Refuse layers that draw or that mix examples.

    Raises:
        StochasticModelError: for dropout in training mode, and for a batch norm that uses the batch's own statistics:
            the gradient of an example is not defined there, and means over micro-batches are not those of one batch.
    """
    for name, module in model.named_modules():
        if isinstance(module, _DROPOUTS) and module.training and module.p > 0:
            raise StochasticModelError(
                f"{name!r} is a {type(module).__name__} with p={module.p:g} in training mode, so curvature is another "
                "at every call; call model.eval() first"
            )
        if isinstance(module, _BATCH_NORMS) and _uses_batch_statistics(module):
            raise StochasticModelError(
                f"{name!r} is a {type(module).__name__} that normalises by the batch itself or changes its running "
                "statistics, so curvature would depend on how examples are grouped; call model.eval() first, and give "
                "it track_running_stats=True"
            )


def _uses_batch_statistics(module: nn.Module) -> bool:
    tracks = getattr(module, "running_mean", None) is not None
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        # Its statistics are each example's own; only the running ones would change.
        return tracks and module.training
    return module.training or not tracks


def is_missing_derivative(error: Exception) -> bool:
    """Tell whether PyTorch says that it lacks a derivative."""
    if isinstance(error, CheapgradError):
        return False
    return any(text in str(error).lower() for text in _MISSING)


def check_twice_differentiable(model: nn.Module, tensors: Sequence[Tensor]) -> None:
    """Look through the graph of a loss or a gradient for functions whose backward pass cannot be differentiated.

    Raises:
        UnsupportedModelError: if there is one.
    """
    if has_lost_derivative(tensors):
        raise explain_missing(model, "one of its functions is marked once_differentiable")


def has_lost_derivative(tensors: Sequence[Tensor]) -> bool:
    """Tell whether a function in the graph of tensors is marked once_differentiable.

    PyTorch puts a node that raises behind its gradient, but not where the cotangent is a constant; nor does a second
    backward pass towards chosen tensors run that node, since no chosen tensor lies behind it. What should have come
    through it would be missing without a word.
    """
    return any(_is_marked(node) for node in walk_graph(tensors))


def _is_marked(node: Node) -> bool:
    function = getattr(type(node), "_forward_cls", None)
    if function is not None:
        return getattr(function.backward, "__code__", None) is _MARKED
    return node.name() == "torch::autograd::Error"


def walk_graph(tensors: Sequence[Tensor]) -> Iterator[Node]:
    """Yield every node of the graph that tensors were computed by, once."""
    open_nodes = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(open_nodes)
    while open_nodes:
        node = open_nodes.pop()
        yield node
        found = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= found
        open_nodes += found


def explain_missing(model: nn.Module, error: Exception | str) -> UnsupportedModelError:
    """Return the error to raise where no route to the product is left."""
    return UnsupportedModelError(
        f"PyTorch cannot differentiate a {type(model).__name__} as this curvature product needs it: {error}. Replace "
        "the operation by one with second derivatives, or select parameters above it with parameters=[...]"
    )


def _random_state(device: torch.device) -> Tensor:
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else state
