"""Kronecker-factored curvature as an operator: per layer a basis, and a magnitude along each of its directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from cheapgrad.curvature.finite_population import FinitePopulation
from cheapgrad.curvature.kronecker.factors import BasisPair
from cheapgrad.curvature.kronecker.layers import AbstractLayer
from cheapgrad.curvature.kronecker.outputs import AbstractOutputs
from cheapgrad.curvature.operators import AbstractOperator
from cheapgrad.curvature.operators.parameters import ParameterSelection
from cheapgrad.errors import OperatorError, ShapeError, SingularCurvatureError


@final
@dataclass(frozen=True)
class KroneckerBlock:
    """One layer's curvature ``(Q_A ⊗ Q_G) diag(eigenvalues) (Q_A ⊗ Q_G)ᵀ``.

    Attributes:
        layer: whose parameters it is about.
        basis: its directions.
        eigenvalues_QOI: the magnitude along each of them.
    """

    layer: AbstractLayer
    basis: BasisPair
    eigenvalues_QOI: Tensor

    def multiply(self, block_QOI: Tensor) -> Tensor:
        """Return the product with parameters laid out as ``[..., Q, O, I]``."""
        return self.basis.rotate_back(self.eigenvalues_QOI * self.basis.rotate(block_QOI))


@final
class KroneckerCurvature(AbstractOperator):
    """A block-diagonal curvature matrix, one Kronecker-structured block per layer; build it with `kfac` or `ekfac`.

    Args:
        blocks: one per layer.
        selection: the parameters, in the order of the vectors that are multiplied.
        example_count: examples behind the eigenvalues.
        likelihood: whose curvature it is, where that is known.

    Law:
        Symmetric, and positive semi-definite where the eigenvalues are. Products, solves, functions of the matrix and
        determinants cost one rotation to the basis and back: ``O(O·I·(O + I))`` per layer.
    """

    def __init__(
        self,
        blocks: tuple[KroneckerBlock, ...],
        selection: ParameterSelection,
        example_count: float | None = None,
        likelihood: AbstractOutputs | None = None,
    ) -> None:
        self.blocks, self.selection, self._example_count = blocks, selection, example_count
        self.likelihood = likelihood

    @property
    def shape(self) -> tuple[int, int]:
        """P, P."""
        return self.selection.size, self.selection.size

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self.selection.dtype

    @property
    def device(self) -> torch.device:
        """The parameters' device."""
        return self.selection.device

    @property
    def example_count(self) -> float | None:
        """What was given."""
        return self._example_count

    @property
    def eigenvalues(self) -> dict[str, Tensor]:
        """Magnitudes along the directions, ``[Q, O, I]`` by layer name."""
        return {block.layer.name: block.eigenvalues_QOI for block in self.blocks}

    def split(self, vectors: Tensor) -> dict[str, Tensor]:
        """Return vectors ``[..., P]`` as blocks ``[..., Q, O, I]`` by layer name."""
        pieces = dict(
            zip(self.selection.names, vectors.split([s.numel() for s in self.selection.shapes], -1), strict=True)
        )
        shapes = dict(zip(self.selection.names, self.selection.shapes, strict=True))
        return {
            layer.name: layer.pack(
                {
                    own: pieces[full].reshape(*vectors.shape[:-1], *shapes[full])
                    for own, full in _full_names(layer).items()
                }
            )
            for layer in (block.layer for block in self.blocks)
        }

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return blocks by layer name as vectors ``[..., P]``: the inverse of `split`."""
        pieces: dict[str, Tensor] = {}
        leading = next(iter(parts.values())).shape[:-3]
        for layer in (block.layer for block in self.blocks):
            tensors, names = layer.unpack(parts[layer.name]), _full_names(layer)
            pieces |= {names[own]: tensor.reshape(*leading, -1) for own, tensor in tensors.items()}
        return torch.cat([pieces[name] for name in self.selection.names], -1)

    def trace(self) -> Tensor:
        """Return the sum of the eigenvalues."""
        return torch.stack([block.eigenvalues_QOI.sum() for block in self.blocks]).sum()

    def log_determinant(self) -> Tensor:
        """Return the sum of the eigenvalues' logarithms; minus infinity for a singular matrix."""
        return torch.stack([block.eigenvalues_QOI.log().sum() for block in self.blocks]).sum()

    def replace_eigenvalues(self, function: Callable[[str, Tensor], Tensor]) -> KroneckerCurvature:
        """Return the matrix with the same basis and eigenvalues ``function(layer name, eigenvalues)``.

        Example:
            A damped inverse is ``curvature.replace_eigenvalues(lambda name, values: 1 / (values + 1e-3))``.
        """
        blocks = []
        for block in self.blocks:
            values = function(block.layer.name, block.eigenvalues_QOI)
            if values.shape != block.eigenvalues_QOI.shape:
                raise ShapeError(
                    f"the eigenvalues of layer {block.layer.name!r} have the shape "
                    f"{tuple(block.eigenvalues_QOI.shape)}, but the function returned {tuple(values.shape)}"
                )
            blocks.append(KroneckerBlock(block.layer, block.basis, values))
        return KroneckerCurvature(tuple(blocks), self.selection, self._example_count, self.likelihood)

    def solve(self, operand: Tensor, damping: float = 0.0) -> Tensor:
        """Return ``(A + damping·I)⁻¹ operand``.

        Args:
            operand: ``[P]`` or ``[P, R]``.
            damping: added to every eigenvalue, in the curvature's unit.

        Raises:
            SingularCurvatureError: naming a layer in which an eigenvalue plus the damping is not above rounding.
        """
        top = max(float(block.eigenvalues_QOI.abs().max()) for block in self.blocks)
        floor = torch.finfo(self.dtype).eps * (top + abs(damping))
        for block in self.blocks:
            low = block.eigenvalues_QOI + damping
            if float(low.min()) <= floor:
                raise SingularCurvatureError(
                    f"layer {block.layer.name!r} has {int((low <= floor).sum())} of {low.numel()} eigenvalues at or "
                    f"below {floor:.3g} with damping={damping!r}, so the system is singular; use a positive damping, "
                    f"such as {max(top * 1e-3, 1e-8):.1g}"
                )
        return self.replace_eigenvalues(lambda _, values: 1 / (values + damping)) @ operand

    def correct_for_population(
        self, same_batch: KroneckerCurvature, population: FinitePopulation
    ) -> KroneckerCurvature:
        """Return eigenvalues of the whole population, where the two batches were drawn disjoint from it.

        Args:
            same_batch: the same basis, with eigenvalues of the batch that gave the basis.
            population: sizes of the whole and of both batches.

        Law:
            Corrected eigenvalues ``(A / N)·same + ((N - A) / N)·held_out`` of `ekfac` have the population's own as
            their mean, given the basis. Those of `kfac` are products of two means, which no mixture makes unbiased.

        Raises:
            OperatorError: if the two do not have the same basis.
        """
        others = {block.layer.name: block for block in same_batch.blocks}
        for block in self.blocks:
            other = others.get(block.layer.name)
            if other is None or not block.basis.equals(other.basis):
                raise OperatorError(
                    f"layer {block.layer.name!r} has another basis in the two curvatures, so that their eigenvalues "
                    "belong to other directions; measure both along one basis"
                )
        own = same_batch.eigenvalues
        return self.replace_eigenvalues(lambda name, values: population.combine(own[name], values))

    def _multiply(self, columns_PR: Tensor) -> Tensor:
        parts = self.split(columns_PR.mT)
        return self.join({block.layer.name: block.multiply(parts[block.layer.name]) for block in self.blocks}).mT


def _full_names(layer: AbstractLayer) -> dict[str, str]:
    return {own: f"{layer.name}.{own}" if layer.name else own for own in layer.parameter_names}
