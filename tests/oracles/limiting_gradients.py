"""All limiting gradients of a small piecewise linear program, by listing the pieces that meet at a point.

A program is a list of instructions over numbered nodes, the inputs first:
``("combine", {node: integer, ...}, constant)`` or ``("relu", node)``. It is taken at an integer point, so all of this
is exact but for the linear programs that decide whether a piece has an interior, whose data are small integers.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog


def limiting_gradients(program: list[tuple], point: list[int]) -> set[tuple[int, ...]]:
    """Return the gradients of all full-dimensional pieces of the last node that touch `point`."""
    inputs = len(point)
    found: set[tuple[int, ...]] = set()
    # A piece under construction: values and gradients of its nodes so far, the half-spaces that bound it, and a
    # direction that leads into its interior.
    start = (list(point), [tuple(int(i == j) for j in range(inputs)) for i in range(inputs)], [], np.ones(inputs))
    waiting = [start]
    while waiting:
        values, gradients, bounds, inside = waiting.pop()
        place = len(values) - inputs
        if place == len(program):
            found.add(gradients[-1])
            continue
        for value, gradient, new_bounds in _outcomes(program[place], values, gradients):
            leads = _direction_into(bounds + new_bounds, inside)
            if leads is not None:
                waiting.append(([*values, value], [*gradients, gradient], bounds + new_bounds, leads))
    return found


def limiting_gradient_along(program: list[tuple], point: list[int], direction: np.ndarray) -> tuple[int, ...]:
    """Return the gradient of the piece that one enters from `point` along a direction in general position."""
    inputs = len(point)
    values, gradients = list(point), [tuple(int(i == j) for j in range(inputs)) for i in range(inputs)]
    for instruction in program:
        outcomes = _outcomes(instruction, values, gradients)
        entered = [outcome for outcome in outcomes if all(np.dot(bound, direction) > 0 for bound in outcome[2])]
        ((value, gradient, _),) = entered
        values.append(value)
        gradients.append(gradient)
    return gradients[-1]


def _outcomes(instruction, values, gradients):
    """Return value, gradient and new bounds of a node, once for each side of its kink."""
    if instruction[0] == "combine":
        _, weights, constant = instruction
        value = constant + sum(weight * values[node] for node, weight in weights.items())
        gradient = np.zeros(len(gradients[0]), dtype=int)
        for node, weight in weights.items():
            gradient += weight * np.array(gradients[node])
        return [(value, tuple(gradient.tolist()), [])]
    value, gradient = values[instruction[1]], gradients[instruction[1]]
    nothing = tuple(0 for _ in gradient)
    if value > 0:
        return [(value, gradient, [])]
    # What does not change on this piece has no kink on it.
    if value < 0 or gradient == nothing:
        return [(0, nothing, [])]
    return [(0, gradient, [gradient]), (0, nothing, [tuple(-part for part in gradient)])]


def _direction_into(bounds, guess):
    """Return a direction with a positive product with every bound; None if there is none."""
    if not bounds:
        return guess
    rows = np.array(bounds, dtype=float)
    if np.all(rows @ guess > 1e-6):
        return guess
    inputs = rows.shape[1]
    # Maximise the smallest product over the cube: positive if and only if the piece has an interior.
    solved = linprog(
        [0.0] * inputs + [-1.0],
        A_ub=np.hstack([-rows, np.ones((len(rows), 1))]),
        b_ub=np.zeros(len(rows)),
        bounds=[(-1, 1)] * inputs + [(None, 1)],
        method="highs",
    )
    return solved.x[:-1] if solved.x[-1] > 1e-6 else None
