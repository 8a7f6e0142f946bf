"""Activations called as functions between converted layers, recognised in the autograd graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _autograd  # type: ignore[attr-defined] - private, and the only way to see the hooks around

from cheapgrad.ops._activation_table import SELU_ALPHA, SELU_SCALE
from cheapgrad.ops.activation import Activation
from cheapgrad.ops.chains.activation_stage import ActivationStage
from cheapgrad.ops.chains.chain import Chain, Link, chain_of_node, settle
from cheapgrad.ops.chains.rebuilding import current_scope
from cheapgrad.ops.chains.watching import is_observed
from cheapgrad.sketch import AbstractStrategy


def _leaky_relu(node: Any) -> Activation:
    return Activation("leaky_relu", (("negative_slope", float(node._saved_negative_slope)),))


def _elu(node: Any) -> Activation | None:
    if (node._saved_scale, node._saved_input_scale) == (1, 1):
        return Activation("elu", (("alpha", float(node._saved_alpha)),))
    is_selu = (node._saved_alpha, node._saved_scale, node._saved_input_scale) == (SELU_ALPHA, SELU_SCALE, 1)
    return Activation("selu") if is_selu else None


# Name of the autograd node -> the activation it stands for.
_NODES: dict[str, Callable[[Any], Activation | None]] = {
    "GeluBackward0": lambda node: Activation("gelu", (("approximate", node._saved_approximate),)),
    "SiluBackward0": lambda node: Activation("silu"),
    "MishBackward0": lambda node: Activation("mish"),
    "HardswishBackward0": lambda node: Activation("hardswish"),
    "HardsigmoidBackward0": lambda node: Activation("hardsigmoid"),
    "TanhBackward0": lambda node: Activation("tanh"),
    "SigmoidBackward0": lambda node: Activation("sigmoid"),
    "ReluBackward0": lambda node: Activation("relu"),
    "EluBackward0": _elu,
    "CeluBackward0": lambda node: Activation("celu", (("alpha", float(node._saved_alpha)),)),
    "SoftplusBackward0": lambda node: Activation(
        "softplus", (("beta", float(node._saved_beta)), ("threshold", float(node._saved_threshold)))
    ),
    "LeakyReluBackward0": _leaky_relu,
    "LeakyReluBackward1": _leaky_relu,
    "HardshrinkBackward0": lambda node: Activation("hardshrink", (("lambd", float(node._saved_lambd)),)),
    "SoftshrinkBackward0": lambda node: Activation("softshrink", (("lambd", float(node._saved_lambd)),)),
    "HardtanhBackward0": lambda node: Activation(
        "hardtanh", (("min_val", float(node._saved_min_val)), ("max_val", float(node._saved_max_val)))
    ),
}
# Their nodes hold the output, which the slopes here are not read from, or do not say all options.
_UNREADABLE_IN_PLACE = frozenset({"elu", "celu", "selu", "threshold"})


def recognises(node: Any) -> bool:
    """Tell whether an autograd node is an activation that joins a chain.

    Args:
        node: of the autograd graph.
    """
    return node.name() in _NODES


def recognises_in_place(activation: Activation) -> bool:
    """Tell whether an activation that overwrites its input joins a chain: its node says what the slopes were.

    Args:
        activation: which one.
    """
    return activation.name not in _UNREADABLE_IN_PLACE


def recognise_chain(x: Tensor, stored: AbstractStrategy | None) -> Chain | None:
    """Return the chain of ``x = activation(h)`` where h is the output of a chain, or None.

    Args:
        x: the output of the activation.
        stored: codec for the activation's derivative, or None to keep what autograd keeps.

    Works in eager mode only: compiled graphs and torch.func transforms show no autograd graph. A tensor that was
    overwritten, or whose gradient somebody asked to see, is not passed over.
    """
    if not shows_saved_tensors():
        return None
    node: Any = x.grad_fn
    if node is None or not recognises(node) or is_observed(x):
        return None
    chain = chain_of_node(node.next_functions[0][0])
    read = None if chain is None else read_activation(node)
    if chain is None or read is None:
        return None
    stage, held = dataclasses.replace(read[0], stored=stored), read[1]
    with torch.no_grad():
        link = Link(stage, (), stage.record(held, (), is_rebuilt=False))
    # The activation's own node holds the tensor that codes are to replace.
    is_linked = chain.is_linked and stored is None
    return dataclasses.replace(chain, links=(*settle(chain).links, link), version=x._version, is_linked=is_linked)


def read_activation(node: Any) -> tuple[ActivationStage, Tensor] | None:
    """Return the activation that a node stands for and what it holds, its input or its output; None if it was freed.

    Args:
        node: one that `recognises` knows.
    """
    reads_input = hasattr(type(node), "_saved_self")
    try:
        held = node._saved_self if reads_input else node._saved_result
    except RuntimeError:
        # Freed by a backward pass, or overwritten: autograd will say so if it matters.
        return None
    activation = _NODES[node.name()](node)
    # Of an activation whose derivative is a function of the output, the output is held.
    return None if activation is None else (ActivationStage(activation, keeps_output=not reads_input), held.detach())


def shows_saved_tensors() -> bool:
    """Tell whether nodes can be asked what they saved: not in compiled graphs, and not inside a checkpoint.

    A checkpoint that is not a reentrant one would run its block again for an answer.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    scope = current_scope()
    hooks = (_autograd._top_saved_tensors_default_hooks(True), scope.outer_hooks if scope is not None else None)
    return all(pair is None or pair[0].__module__ != "torch.utils.checkpoint" for pair in hooks)
