"""Twins of the shipped parts with one mistake each: biased, or of another variance than they say.

Most mistakes are those of published code: weights left out, a scale of r N for N / r, the padded length forgotten,
`torch.multinomial` taken to have the marginals asked for, one draw used for two.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from cheapgrad.sketch import (
    AbstractDesign,
    AbstractStrategy,
    CountSketch,
    Hadamard,
    Selection,
    Variance,
    random,
    water_filling,
)
from cheapgrad.sketch.drawn import DrawnDense, DrawnRows, StoredDense
from cheapgrad.sketch.projections.hadamard import DrawnHadamard, padded_size


@dataclass(frozen=True, repr=False)
class AbstractTwin(AbstractStrategy):
    """A strategy that does what another does, but for one thing."""

    inner: AbstractStrategy

    @property
    def law(self):
        return self.inner.law

    def store(self, operands, memory=None):
        return self.inner.store(operands, memory)

    def restore(self, kept, rows, inputs, dtype):
        return self.inner.restore(kept, rows, inputs, dtype)

    def draw(self, operands, memory=None):
        return self.inner.draw(operands, memory)


@dataclass(frozen=True, repr=False)
class TwinScaled(AbstractTwin):
    """Two per cent too long."""

    factor: float = 1.02

    def restore(self, kept, rows, inputs, dtype):
        return StoredDense(self.factor * self.inner.restore(kept, rows, inputs, dtype).dense())

    def draw(self, operands, memory=None):
        return DrawnDense(self.factor * self.inner.draw(operands, memory).dense())


@dataclass(frozen=True, repr=False)
class TwinOfOtherVariance(AbstractTwin):
    """States a variance that it has not."""

    factor: float = 1.1

    @property
    def law(self):
        inner = self.inner.law

        def variance(tensors, moment):
            stated = inner._variance(tensors, moment)
            return Variance(self.factor * stated.input, self.factor * stated.weight)

        return dataclasses.replace(inner, _variance=variance)


@dataclass(frozen=True, repr=False)
class AbstractTwinDesign(AbstractDesign):
    """A design that states the variance of another, but draws otherwise."""

    inner: AbstractDesign

    def variance(self, squared_norms, scores, count, squared_norm_of_sum):
        return self.inner.variance(squared_norms, scores, count, squared_norm_of_sum)


@dataclass(frozen=True, repr=False)
class TwinUnweighted(AbstractTwinDesign):
    """Leaves out the weights ``1 / p``."""

    def draw(self, scores, count, generator=None):
        drawn = self.inner.draw(scores, count, generator)
        return dataclasses.replace(drawn, weight_K=torch.ones_like(drawn.weight_K))


@dataclass(frozen=True, repr=False)
class TwinOneLess(AbstractTwinDesign):
    """Draws one atom less than its weights are made for."""

    def draw(self, scores, count, generator=None):
        fewer = self.inner.draw(scores, count - 1, generator)
        weights = 1 / water_filling(scores, count).gather(-1, fewer.index_K)
        return dataclasses.replace(fewer, weight_K=weights)


@dataclass(frozen=True, repr=False)
class TwinMultinomial(AbstractTwinDesign):
    """Draws as `torch.multinomial` without replacement does, and takes p for its inclusion probabilities."""

    def draw(self, scores, count, generator=None):
        probabilities = water_filling(scores, count)
        keys = random.uniform(scores, scores.shape, generator=generator).log() / probabilities
        index = keys.topk(count).indices
        return Selection(index, 1 / probabilities.gather(-1, index), scores.shape[-1])


@dataclass(frozen=True, repr=False)
class TwinOneCoin(AbstractTwinDesign):
    """Poisson sampling with one coin for all atoms: the right marginals, all atoms together or not at all."""

    def draw(self, scores, count, generator=None):
        probabilities = water_filling(scores, count)
        kept = random.uniform(scores, (1,), generator=generator) < probabilities
        index = torch.arange(scores.shape[-1])
        return Selection(index, kept / probabilities.clamp(min=1e-30), scores.shape[-1])


@dataclass(frozen=True, repr=False)
class TwinSharedMask(AbstractTwinDesign):
    """Uses the first group's draw for every group."""

    def draw(self, scores, count, generator=None):
        drawn = self.inner.draw(scores[:1], count, generator)
        shape = (scores.shape[0], -1)
        return dataclasses.replace(drawn, index_K=drawn.index_K.expand(shape), weight_K=drawn.weight_K.expand(shape))


class _ScaledHadamard(DrawnHadamard):
    scale = 1.0

    def project(self, matrix_ND):
        return self.scale * super().project(matrix_ND)

    def transpose_project(self, matrix_KD):
        return self.scale * super().transpose_project(matrix_KD)


@dataclass(frozen=True, repr=False)
class TwinHadamardForgetsPadding(Hadamard):
    """Scales by N / K where the padded length over K is right."""

    def draw(self, like, size, count, generator=None):
        drawn = _ScaledHadamard(*super().draw(like, size, count, generator).tensors())
        drawn.scale = (size / padded_size(size)) ** 0.5
        return drawn

    def rebuild(self, tensors, size, count, like):
        drawn = _ScaledHadamard(*tensors)
        drawn.scale = (size / padded_size(size)) ** 0.5
        return drawn


@dataclass(frozen=True, repr=False)
class TwinHadamardScaledByProduct(Hadamard):
    """Scales by r N where N / r is right."""

    def draw(self, like, size, count, generator=None):
        drawn = _ScaledHadamard(*super().draw(like, size, count, generator).tensors())
        drawn.scale = float(count)
        return drawn


@dataclass(frozen=True, repr=False)
class TwinCountSketchWithoutSigns(CountSketch):
    """Adds rows up in their bins without signs."""

    def draw(self, like, size, count, generator=None):
        drawn = super().draw(like, size, count, generator)
        drawn._signed_bin_N = torch.where(drawn._signed_bin_N < 0, -1 - drawn._signed_bin_N, drawn._signed_bin_N)
        return drawn


@dataclass(frozen=True, repr=False)
class TwinProjectionDrawnTwice(AbstractTwin):
    """Draws the projection anew for the partner of the contraction, as unseeded generators did."""

    def restore(self, kept, rows, inputs, dtype):
        other = self.inner.kind.draw(kept[0], rows, self.inner.kept_count(rows))
        return self.inner.restore((kept[0], *other.tensors()), rows, inputs, dtype)


@dataclass(frozen=True, repr=False)
class TwinRoundsToNearest(AbstractTwin):
    """Adds a half instead of a random number."""

    def store(self, operands, memory=None):
        saved, random.uniform = random.uniform, _half
        try:
            return self.inner.store(operands, memory)
        finally:
            random.uniform = saved


@dataclass(frozen=True, repr=False)
class TwinOneDither(AbstractTwin):
    """Rounds all entries by one random number."""

    def store(self, operands, memory=None):
        saved = random.uniform
        random.uniform = lambda like, shape, **options: saved(like, (1,), **options).expand(tuple(shape))
        try:
            return self.inner.store(operands, memory)
        finally:
            random.uniform = saved


def _half(like, shape, *, double=True, generator=None):
    return torch.full(tuple(shape), 0.5, dtype=torch.float64 if double else torch.float32)


@dataclass(frozen=True, repr=False)
class TwinMaskUnweighted(AbstractTwin):
    """Sets entries to zero without weighting the others."""

    def draw(self, operands, memory=None):
        exact = operands.cotangent()
        return DrawnDense(torch.where(self.inner.draw(operands, memory).dense() != 0, exact, 0.0))

    def store(self, operands, memory=None):
        index_K = self.inner.store(operands, memory)[1]
        return torch.gather(operands.stored_dense().flatten(), 0, index_K), index_K


@dataclass(frozen=True, repr=False)
class TwinTruncated(AbstractTwin):
    """The best matrix of rank R instead of a random one."""

    def _best(self, matrix):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        rank = self.inner.rank
        return (left[:, :rank] * values[:rank]) @ right[:rank]

    def draw(self, operands, memory=None):
        return DrawnDense(self._best(operands.cotangent()))

    def store(self, operands, memory=None):
        return (self._best(operands.stored_dense()),)

    def restore(self, kept, rows, inputs, dtype):
        return StoredDense(kept[0])


@dataclass(frozen=True, repr=False)
class TwinRowsDrawnTwice(AbstractTwin):
    """Serves dX with one draw and dW with the weights of another."""

    def draw(self, operands, memory=None):
        first, second = self.inner.draw(operands, memory), self.inner.draw(operands, memory)
        mixed = dataclasses.replace(first.sketch, weight_K=second.sketch.weight_K)
        return DrawnRows(mixed, operands.cotangent())
