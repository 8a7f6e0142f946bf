"""Random ReLU programs with exact kinks, as lists of instructions and as functions of torch tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Program = list[tuple]


def random_program(generator: np.random.Generator, kink_chance: float) -> tuple[Program, list[int]]:
    """Return a program and an integer point at which at least one ReLU of it stands exactly on its kink.

    Sums of random nodes and a constant, each followed by a ReLU, in any order; with `kink_chance` the constant puts the
    sum on the kink.
    """
    while True:
        point = [int(value) for value in generator.integers(-1, 2, int(generator.integers(2, 5)))]
        program: Program = []
        values = list(point)
        kinked = False
        for _ in range(int(generator.integers(3, 7))):
            weights = _random_weights(generator, len(values), int(generator.integers(2, 4)), [-2, -1, 1, 2])
            total = sum(weight * values[node] for node, weight in weights.items())
            constant = -total if generator.random() < kink_chance else int(generator.integers(-1, 2))
            program += [("combine", weights, constant), ("relu", len(values))]
            kinked |= total + constant == 0
            values += [total + constant, max(0, total + constant)]
        program.append(("combine", _random_weights(generator, len(values), 5, [-1, 1]), 0))
        if kinked:
            return program, point


def random_network(generator: np.random.Generator) -> tuple[Program, list[int]]:
    """Return ``m₃ᵀ relu(M₂ relu(M₁ x))`` with entries in {-1, 0, 1}, at ``x = 0``, where every ReLU is on its kink."""
    inputs, width = 2, 3
    program: Program = []
    layer = list(range(inputs))
    for _ in range(2):
        outputs = []
        for _ in range(width):
            entries = generator.integers(-1, 2, len(layer))
            program.append(("combine", {node: int(e) for node, e in zip(layer, entries, strict=True)}, 0))
            program.append(("relu", inputs + len(program) - 1))
            outputs.append(inputs + len(program) - 1)
        layer = outputs
    program.append(("combine", {node: int(generator.integers(-1, 2)) for node in layer}, 0))
    return program, [0] * inputs


def run(program: Program, point: Tensor) -> Tensor:
    """Run a program on a vector."""
    nodes = list(point.unbind())
    for instruction in program:
        if instruction[0] == "relu":
            nodes.append(torch.relu(nodes[instruction[1]]))
        else:
            _, weights, constant = instruction
            # Without zeros times nodes the node would be a constant, and torch would have no gradient for it.
            nodes.append(sum((weight * nodes[node] for node, weight in weights.items()), constant + 0 * point.sum()))
    return nodes[-1]


def _random_weights(generator: np.random.Generator, nodes: int, count: int, choices: list[int]) -> dict[int, int]:
    chosen = generator.choice(nodes, size=min(nodes, count), replace=False)
    return {int(node): int(generator.choice(choices)) for node in chosen}
