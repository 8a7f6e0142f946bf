"""The first stage: second moments of activations and cotangents, and the basis that they give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from cheapgrad.curvature.kronecker.finite import check_finite
from cheapgrad.curvature.kronecker.problem import Problem
from cheapgrad.curvature.kronecker.rows import WeightSharing
from cheapgrad.curvature.kronecker.tape import measuring, record
from cheapgrad.curvature.operators.batches import Batches


@final
@dataclass(frozen=True)
class FactorPair:
    """The Kronecker factors of one layer: its curvature is about ``inputs ⊗ outputs``.

    Attributes:
        inputs: second moment of activations, ``[Q, I, I]``, or its diagonal ``[Q, I]``.
        outputs_QOO: second moment of cotangents, summed over positions.
    """

    inputs: Tensor
    outputs_QOO: Tensor


@final
@dataclass(frozen=True)
class BasisPair:
    """Eigenvectors of a layer's two factors, as columns.

    Attributes:
        inputs_QII: of the activations' factor; None where that is diagonal.
        outputs_QOO: of the cotangents' factor.
    """

    inputs_QII: Tensor | None
    outputs_QOO: Tensor

    def equals(self, other: BasisPair) -> bool:
        """Tell whether both hold the same eigenvectors, entry by entry."""
        if not torch.equal(self.outputs_QOO, other.outputs_QOO):
            return False
        if self.inputs_QII is None or other.inputs_QII is None:
            return self.inputs_QII is other.inputs_QII
        return torch.equal(self.inputs_QII, other.inputs_QII)

    def rotate(self, block_QOI: Tensor) -> Tensor:
        """Return the coordinates ``Q_Gᵀ M Q_A`` of a block ``[..., Q, O, I]``."""
        rotated = self.outputs_QOO.mT @ block_QOI
        return rotated if self.inputs_QII is None else rotated @ self.inputs_QII

    def rotate_back(self, block_QOI: Tensor) -> Tensor:
        """Return the block of given coordinates: the inverse of `rotate`."""
        rotated = self.outputs_QOO @ block_QOI
        return rotated if self.inputs_QII is None else rotated @ self.inputs_QII.mT

    def read_eigenvalues(self, factors: FactorPair) -> Tensor:
        """Return ``diag(Q_Gᵀ G Q_G) ⊗ diag(Q_Aᵀ A Q_A)``, ``[Q, O, I]``, for the factors of any batch."""
        inputs = factors.inputs
        if self.inputs_QII is not None:
            inputs = (self.inputs_QII * (inputs @ self.inputs_QII)).sum(1)
        outputs = (self.outputs_QOO * (factors.outputs_QOO @ self.outputs_QOO)).sum(1)
        # Second moments: below zero by rounding only.
        return (outputs[:, :, None] * inputs[:, None, :]).clamp_min(0)


@final
@dataclass(frozen=True)
class KroneckerFactors:
    """Factors of all layers.

    Attributes:
        pairs: by layer name.
        example_count: examples that they are a mean over.
    """

    pairs: dict[str, FactorPair]
    example_count: float

    def find_basis(self) -> dict[str, BasisPair]:
        """Return the eigenvectors of every factor, by layer name."""
        return {
            name: BasisPair(
                None if pair.inputs.ndim == 2 else _find_eigenvectors(pair.inputs), _find_eigenvectors(pair.outputs_QOO)
            )
            for name, pair in self.pairs.items()
        }


def measure_factors(problem: Problem, batches: Any) -> KroneckerFactors:
    """Return the factors of every layer, from one forward pass and the Fisher's backward passes per batch.

    ``A = mean of a aᵀ``, ``G = Σ_columns g gᵀ / examples``, over examples and positions as the weight sharing says.

    Raises:
        NonFiniteCurvatureError: naming a layer whose factor is not finite.
    """
    options = problem.options
    inputs: dict[str, list[Any]] = {layer.name: [0.0, 0] for layer in problem.layers}
    outputs: dict[str, Any] = {layer.name: 0.0 for layer in problem.layers}
    examples = 0.0
    with measuring(problem):
        for batch in Batches(batches, options.reader, problem.selection.device):
            tape = record(problem, batch)
            if not examples:
                tape.check_gradients()
            examples += batch.examples
            for layer in problem.layers:
                total, count = tape.rows[layer.name].second_moment(options.sharing)
                inputs[layer.name][0] += total
                inputs[layer.name][1] += count
            for cotangent in options.fisher.cotangents(tape.outputs, batch.targets, problem.likelihood):
                for name, rows_QBTO in tape.pull_back(cotangent).items():
                    if options.sharing is WeightSharing.REDUCE:
                        rows_QBTO = rows_QBTO.sum(2, keepdim=True)
                    flat = rows_QBTO.flatten(1, 2)
                    outputs[name] += flat.mT @ flat
    pairs = {name: FactorPair(total / count, outputs[name] / examples) for name, (total, count) in inputs.items()}
    for name, pair in pairs.items():
        check_finite(name, "activations' factor", pair.inputs)
        check_finite(name, "cotangents' factor", pair.outputs_QOO)
    return KroneckerFactors(pairs, examples)


def _find_eigenvectors(factor: Tensor) -> Tensor:
    # Float32 eigenvectors of a nearly singular factor lose their orthogonality to the batch's scale.
    return torch.linalg.eigh(factor.double()).eigenvectors.to(factor.dtype)
