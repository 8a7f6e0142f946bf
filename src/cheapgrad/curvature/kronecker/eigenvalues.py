"""The second stage: magnitudes along a basis, on a batch of one's choice."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cheapgrad.curvature.kronecker.factors import BasisPair
from cheapgrad.curvature.kronecker.finite import check_finite
from cheapgrad.curvature.kronecker.problem import Problem
from cheapgrad.curvature.kronecker.tape import measuring, record
from cheapgrad.curvature.operators.batches import Batches


def measure_eigenvalues(problem: Problem, batches: Any, basis: dict[str, BasisPair]) -> tuple[dict[str, Tensor], float]:
    """Return the curvature along every direction of a basis, by layer name ``[Q, O, I]``, and the number of examples.

    ``λ_oi = mean over examples of Σ_columns ((Q_Gᵀ gradient Q_A)_oi)²``: the diagonal of the layer's own curvature in
    this basis, which is the best diagonal in Frobenius norm and keeps the layer's trace.

    Raises:
        NonFiniteCurvatureError: naming a layer whose eigenvalues are not finite.
    """
    totals: dict[str, Any] = {layer.name: 0.0 for layer in problem.layers}
    examples = 0.0
    with measuring(problem):
        for batch in Batches(batches, problem.options.reader, problem.selection.device):
            tape = record(problem, batch)
            if not examples:
                tape.check_gradients()
            examples += batch.examples
            rotated = {name: rows.rotate(basis[name].inputs_QII) for name, rows in tape.rows.items()}
            for cotangent in problem.options.fisher.cotangents(tape.outputs, batch.targets, problem.likelihood):
                for name, rows_QBTO in tape.pull_back(cotangent).items():
                    rows_QBTO = rows_QBTO @ basis[name].outputs_QOO[:, None]
                    totals[name] += rotated[name].sum_squared_gradients(rows_QBTO)
    eigenvalues = {name: total / examples for name, total in totals.items()}
    for name, values in eigenvalues.items():
        check_finite(name, "eigenvalues", values)
    return eigenvalues, examples
