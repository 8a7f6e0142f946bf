"""What a layer's parameters multiply: rows of activations, per example and position."""

from __future__ import annotations

import abc
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


class WeightSharing(enum.Enum):
    """How K-FAC treats a layer that is used at T positions of an example.

    References:
        Eschenhagen et al. (2023), Kronecker-Factored Approximate Curvature for Modern Neural Network Architectures.
    """

    EXPAND = "expand"
    """Positions as if they were examples: exact for deep linear networks with one loss per position."""
    REDUCE = "reduce"
    """Mean activation and summed cotangent of an example: exact for deep linear networks that average positions."""


class AbstractRows(abc.ABC):
    """Activations of B examples at T positions; a gradient is ``Σ_t g_t a_tᵀ``, per group Q, of shape ``[O, I]``.

    Cotangents have the shape ``[Q, B, T, O]``, or ``[C, Q, B, T, O]`` where several are taken together.
    """

    @abc.abstractmethod
    def second_moment(self, sharing: WeightSharing) -> tuple[Tensor, int]:
        """Return the sum of ``a aᵀ`` (``[Q, I, I]``, or its diagonal ``[Q, I]``) and over how many rows it is."""

    @abc.abstractmethod
    def rotate(self, basis_QII: Tensor | None) -> AbstractRows:
        """Return the rows in the basis whose columns are given; None is the identity."""

    @abc.abstractmethod
    def sum_gradients(self, cotangents_QBTO: Tensor) -> Tensor:
        """Return the gradient summed over examples, ``[Q, O, I]``."""

    @abc.abstractmethod
    def sum_squared_gradients(self, cotangents_QBTO: Tensor) -> Tensor:
        """Return the entrywise square of each example's gradient, summed over examples, ``[Q, O, I]``."""

    @abc.abstractmethod
    def weigh_gradients(self, cotangents: Tensor, weights_QOI: Tensor) -> Tensor:
        """Return inner products of each example's C gradients under diagonal weights, ``[B, C, C]``."""


@final
@dataclass(frozen=True)
class DenseRows(AbstractRows):
    """Activations as they are.

    Attributes:
        rows_QBTI: groups, examples, positions, inputs.
    """

    rows_QBTI: Tensor

    def second_moment(self, sharing: WeightSharing) -> tuple[Tensor, int]:
        """Return the sum over rows, or over the examples' mean rows."""
        rows = self.rows_QBTI
        if sharing is WeightSharing.REDUCE:
            rows = rows.mean(2, keepdim=True)
        flat = rows.flatten(1, 2)
        return flat.mT @ flat, flat.shape[1]

    def rotate(self, basis_QII: Tensor | None) -> DenseRows:
        """Return ``a Q``."""
        return self if basis_QII is None else DenseRows(self.rows_QBTI @ basis_QII[:, None])

    def sum_gradients(self, cotangents_QBTO: Tensor) -> Tensor:
        """Return ``Σ g aᵀ`` over examples and positions."""
        return cotangents_QBTO.flatten(1, 2).mT @ self.rows_QBTI.flatten(1, 2)

    def sum_squared_gradients(self, cotangents_QBTO: Tensor) -> Tensor:
        """Square each example's gradient; with one position the square of a product is a product of squares."""
        if self.rows_QBTI.shape[2] == 1:
            return DenseRows(self.rows_QBTI.square()).sum_gradients(cotangents_QBTO.square())
        return (cotangents_QBTO.mT @ self.rows_QBTI).square().sum(1)

    def weigh_gradients(self, cotangents: Tensor, weights_QOI: Tensor) -> Tensor:
        """Contract over groups, outputs and inputs."""
        if self.rows_QBTI.shape[2] == 1:
            weights_QBO = self.rows_QBTI[:, :, 0].square() @ weights_QOI.mT
            cotangents = cotangents[:, :, :, 0]
            return torch.einsum("cqbo,dqbo,qbo->bcd", cotangents, cotangents, weights_QBO)
        gradients = cotangents.mT @ self.rows_QBTI
        return torch.einsum("cqboi,dqboi->bcd", gradients * weights_QOI[:, None], gradients)


@final
@dataclass(frozen=True)
class OneHotRows(AbstractRows):
    """Rows of an embedding: a single one, at an index; their second moment is diagonal in the vocabulary.

    Attributes:
        index_BT: positions of the ones.
        kept_BT: False where a row counts as zero (padding).
        size: I, the vocabulary.
        dtype: of the results.
    """

    index_BT: Tensor
    kept_BT: Tensor
    size: int
    dtype: torch.dtype

    def second_moment(self, sharing: WeightSharing) -> tuple[Tensor, int]:
        """Return the counts ``[1, I]``; an embedding's positions are always expanded, which keeps them diagonal."""
        counts = torch.bincount(self.index_BT[self.kept_BT], minlength=self.size)
        return counts.to(self.dtype)[None], self.index_BT.numel()

    def rotate(self, basis_QII: Tensor | None) -> OneHotRows:
        """Return the rows: their basis is the identity."""
        return self

    def sum_gradients(self, cotangents_QBTO: Tensor) -> Tensor:
        """Add every row's cotangent at its index."""
        rows = self._mask(cotangents_QBTO)[0].flatten(0, 1)
        return rows.new_zeros(self.size, rows.shape[1]).index_add(0, self.index_BT.flatten(), rows).mT[None]

    def sum_squared_gradients(self, cotangents_QBTO: Tensor) -> Tensor:
        """Sum the cotangents of an index within its example, then square."""
        sums, _, index = self._sum_within_examples(self._mask(cotangents_QBTO)[0])
        return sums.new_zeros(self.size, sums.shape[-1]).index_add(0, index, sums.square()).mT[None]

    def weigh_gradients(self, cotangents: Tensor, weights_QOI: Tensor) -> Tensor:
        """Contract over the indices that an example has."""
        sums, example, index = self._sum_within_examples(self._mask(cotangents)[:, 0])
        products = torch.einsum("cso,dso,so->scd", sums, sums, weights_QOI[0].mT[index])
        return products.new_zeros(len(self.index_BT), *products.shape[1:]).index_add(0, example, products)

    def _mask(self, cotangents: Tensor) -> Tensor:
        return cotangents * self.kept_BT[..., None]

    def _sum_within_examples(self, cotangents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return sums ``[..., pairs, O]`` over equal (example, index) pairs, and both members of each pair."""
        examples = torch.arange(len(self.index_BT), device=self.index_BT.device)[:, None]
        pairs, where = torch.unique((examples * self.size + self.index_BT).flatten(), return_inverse=True)
        rows = cotangents.flatten(-3, -2)
        sums = rows.new_zeros(*rows.shape[:-2], len(pairs), rows.shape[-1]).index_add(-2, where, rows)
        return sums, pairs // self.size, pairs % self.size


def join_rows(parts: Sequence[AbstractRows]) -> AbstractRows:
    """Return the rows of several uses of one layer as further positions of each example."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, OneHotRows):
        one_hot = [part for part in parts if isinstance(part, OneHotRows)]
        index_BT = torch.cat([part.index_BT for part in one_hot], 1)
        return OneHotRows(index_BT, torch.cat([part.kept_BT for part in one_hot], 1), first.size, first.dtype)
    return DenseRows(torch.cat([part.rows_QBTI for part in parts if isinstance(part, DenseRows)], 2))
