"""Gated feed-forwards, ``f(gate(x)) * up(x)`` before a converted layer, recognised in the autograd graph."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.ops.chains.activation_stage import ActivationStage
from cheapgrad.ops.chains.chain import Chain, Link, chain_of_node, settle, untag
from cheapgrad.ops.chains.functional import read_activation, recognises, shows_saved_tensors
from cheapgrad.ops.chains.gated_stage import GatedStage
from cheapgrad.ops.chains.linear_stage import LinearStage
from cheapgrad.ops.chains.watching import Watch, is_observed
from cheapgrad.ops.stored_derivative import StoredDerivative, apply_derivative
from cheapgrad.sketch import AbstractStrategy, StochasticRounding


@dataclass(frozen=True)
class _Gate:
    """One factor of the product: an activation of a linear map's output.

    Attributes:
        chain: of the linear map's output.
        stage: the activation, as it is held.
        slope_from: g, or a where the slope is read from it; None where only codes of the slope are left.
        codes: codes of the slope, or nothing.
    """

    chain: Chain
    stage: ActivationStage
    slope_from: Tensor | None
    codes: tuple[Tensor, ...] = ()

    def times_slope(self, activated: Tensor, up: Tensor) -> Tensor:
        """Return ``u f'(g)``, unbiased where the slope is left in codes."""
        activation, codec = self.stage.activation, self.stage.stored
        if self.slope_from is not None:
            return activation.backward(up, self.slope_from, activated)
        is_rounded = isinstance(codec, StochasticRounding)
        bits = codec.bits if is_rounded and activation.slope_kind == "smooth" else 1
        rows, features = up.numel() // up.shape[-1], up.shape[-1]
        fused = is_rounded and codec.fused
        return apply_derivative(StoredDerivative(activation, bits, rows, features, self.codes, fused), up)


def recognise_gate(x: Tensor, stored: AbstractStrategy | None) -> Chain | None:
    """Return the chain of ``x = f(gate(z)) * up(z)``, gate and up converted linear layers of one input; or None.

    Args:
        x: the product.
        stored: codec for what backward needs of the factors, or None to keep what autograd keeps.
    """
    if not shows_saved_tensors():
        return None
    node: Any = x.grad_fn
    if node is None or node.name() != "MulBackward0" or is_observed(x):
        return None
    try:
        factors = node._saved_self, node._saved_other
    except RuntimeError:
        # Freed by a backward pass, or overwritten: autograd will say so if it matters.
        return None
    sides = [side for side, _ in node.next_functions]
    if any(factor is None or factor.shape != x.shape for factor in factors) or any(side is None for side in sides):
        return None
    for place in (0, 1):
        gate, up = _read_gate(sides[place]), chain_of_node(sides[1 - place])
        if gate is not None and up is not None:
            return _join(x, gate, up, factors[place], factors[1 - place], stored)
    return None


def _read_gate(node: Any) -> _Gate | None:
    """Return the activation that a node stands for, as a module that was converted or as a function."""
    chain = chain_of_node(node)
    if chain is not None:
        last = chain.links[-1]
        if not isinstance(last.stage, ActivationStage) or len(chain.links) < 2:
            return None
        before = dataclasses.replace(chain, links=chain.links[:-1])
        if last.stage.stored is None:
            return _Gate(before, last.stage, last.record[0]) if last.record else None
        return _Gate(before, last.stage, None, last.record)
    before = chain_of_node(node.next_functions[0][0]) if recognises(node) else None
    read = None if before is None else read_activation(node)
    return None if before is None or read is None else _Gate(before, *read)


def _join(
    x: Tensor, gate: _Gate, up: Chain, activated: Tensor, other: Tensor, stored: AbstractStrategy | None
) -> Chain | None:
    of_gate, of_up = settle(gate.chain), settle(up)
    if not _read_alike(of_gate, of_up) or is_observed(activated) or is_observed(other):
        return None
    if stored is None and gate.slope_from is None:
        return None
    gate_link, up_link = of_gate.links[-1], of_up.links[-1]
    untag(of_gate)
    untag(of_up)
    # Both keep the same input; one that is frozen keeps nothing.
    keeper = gate_link if gate_link.record or not up_link.record else up_link
    if not isinstance(keeper.stage, LinearStage):
        return None
    activation = dataclasses.replace(gate.stage, stored=None)
    stage = GatedStage(keeper.stage, activation, stored, len(keeper.record))
    with torch.no_grad():
        a, u = activated.detach(), other.detach()
        by_slope = None if stored is None else gate.times_slope(a, u)
        inner = stage.hold(a if gate.slope_from is None else gate.slope_from, a, u, by_slope)
    link = Link(stage, (*gate_link.parameters, *up_link.parameters), (*keeper.record, *inner))
    # The nodes of the product and of the activation hold the tensors that codes are to replace.
    is_linked = of_gate.is_linked and of_up.is_linked and stored is None
    passed = (*of_gate.passed, *of_up.passed, Watch(activated))
    links = (*of_gate.links[:-1], link)
    return Chain(of_gate.root, links, of_gate.cotangent, x._version, passed, is_linked, of_gate.origin)


def _read_alike(gate: Chain, up: Chain) -> bool:
    """Tell whether two chains are one linear map each behind the same stages of the same root, drawing alike."""
    stages = gate.links[-1].stage, up.links[-1].stage
    # What they keep of the input may differ.
    alike = [dataclasses.replace(stage, stored=None) for stage in stages if isinstance(stage, LinearStage)]
    if len(alike) < 2 or alike[0] != alike[1]:
        return False
    before = gate.links[:-1], up.links[:-1]
    is_same_path = len(before[0]) == len(before[1]) and all(
        one is other or (one.stage == other.stage and one.record == other.record == ())
        for one, other in zip(*before, strict=True)
    )
    return gate.origin is up.origin is not None and is_same_path and gate.cotangent == up.cotangent
