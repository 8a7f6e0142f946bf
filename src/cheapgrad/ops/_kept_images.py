"""What backward has of a convolution's input: the images themselves, or what a strategy kept of them."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cheapgrad.ops._convolution_geometry import Geometry, as_images, as_matrix
from cheapgrad.ops.plan import Plan, poison
from cheapgrad.sketch import AbstractStrategy, ExampleSample, FeatureSample, Selection, StochasticRounding
from cheapgrad.sketch.operands import AbstractStoredMatrix


class AbstractKeptImages(abc.ABC):
    """The input ``[B, I, ...]``, or something random whose expectation it is."""

    #: True if pixels or examples are sketched already, so that cotangent rows need not be drawn again for dW.
    sketches_rows = False

    @abc.abstractmethod
    def images(self) -> Tensor:
        """Return the stand-in for the input, shape ``[B, I, ...]``."""

    @abc.abstractmethod
    def poison(self) -> Tensor:
        """Return 0 if everything kept is finite and NaN otherwise: for dW that reads only a part of it."""

    def examples(self, index_K: Tensor) -> Tensor:
        """Return the given examples of the stand-in, shape ``[K, I, ...]``."""
        return self.images().index_select(0, index_K)

    def weight_gradient(self, geometry: Geometry, grad: Tensor, weight_shape: Sequence[int]) -> Tensor:
        """Return dW of the stand-in."""
        return geometry.weight_gradient(self.images(), grad, weight_shape)


class WholeImages(AbstractKeptImages):
    """The input itself."""

    def __init__(self, images: Tensor) -> None:
        self._images = images

    def images(self) -> Tensor:
        """Return the input."""
        return self._images

    def poison(self) -> Tensor:
        """Return NaN if the input is not finite."""
        return poison(self._images)


class StandInImages(AbstractKeptImages):
    """A dense stand-in, rebuilt from a stored matrix whose rows are pixels."""

    def __init__(self, matrix: AbstractStoredMatrix, kept: tuple[Tensor, ...], shape: Sequence[int]) -> None:
        self._matrix = matrix
        self._kept = kept
        self._shape = shape
        self.sketches_rows = matrix.sketches_rows

    def images(self) -> Tensor:
        """Return the stand-in."""
        return as_images(self._matrix.dense(), self._shape)

    def poison(self) -> Tensor:
        """Return NaN if anything kept is not finite."""
        return torch.stack([poison(tensor) for tensor in self._kept if tensor.is_floating_point()]).sum()

    def examples(self, index_K: Tensor) -> Tensor:
        """Return examples of the stand-in, rebuilding only those."""
        pixels = math.prod(self._shape[2:])
        rows = index_K.unsqueeze(1) * pixels + torch.arange(pixels, device=index_K.device)
        return as_images(self._matrix.rows(rows.flatten()), self._shape)


class RoundedImages(AbstractKeptImages):
    """Codes of images in memory order, whose decoded stand-in lies in memory as the images did."""

    def __init__(self, matrix: AbstractStoredMatrix, kept: tuple[Tensor, ...], shape: Sequence[int]) -> None:
        self._matrix = matrix
        self._kept = kept
        self._shape = tuple(shape)

    def images(self) -> Tensor:
        """Return the stand-in."""
        return self._matrix.dense().view(self._shape)

    def poison(self) -> Tensor:
        """Return NaN if a group is not finite."""
        return torch.stack([poison(tensor) for tensor in self._kept]).sum()

    def examples(self, index_K: Tensor) -> Tensor:
        """Return examples of the stand-in, decoding only those where they are whole groups."""
        return self._matrix.rows(index_K).view(-1, *self._shape[1:])


class KeptExamples(AbstractKeptImages):
    """A few examples, weighted to stand for all: dW needs the cotangent of those only."""

    sketches_rows = True

    def __init__(self, kept: tuple[Tensor, ...], shape: Sequence[int]) -> None:
        sketched_KI, index_K = kept
        self._examples = as_images(sketched_KI, shape)
        self._selection = Selection(index_K, torch.ones_like(index_K), shape[0], may_repeat=True)

    def images(self) -> Tensor:
        """Return the stand-in: zeros for the examples that were not kept."""
        return self._selection.lift(self._examples, 0)

    def poison(self) -> Tensor:
        """Return NaN if a kept example is not finite."""
        return poison(self._examples)

    def weight_gradient(self, geometry: Geometry, grad: Tensor, weight_shape: Sequence[int]) -> Tensor:
        """Return dW from the kept examples; NaN in the cotangent of another one is not hidden."""
        product = geometry.weight_gradient(self._examples, self._selection.gather(grad, 0), weight_shape)
        return product + poison(grad).to(product.dtype)


class KeptChannels(AbstractKeptImages):
    """A few input channels, weighted to stand for all: dW is zero in the others. For one group only."""

    def __init__(self, kept: tuple[Tensor, ...], shape: Sequence[int]) -> None:
        sketched_NK, index_K = kept
        self._channels = as_images(sketched_NK, shape)
        self._selection = Selection(index_K, torch.ones_like(index_K), shape[1], may_repeat=True)

    def images(self) -> Tensor:
        """Return the stand-in: zeros for the channels that were not kept."""
        return self._selection.lift(self._channels, 1)

    def poison(self) -> Tensor:
        """Return NaN if a kept channel is not finite."""
        return poison(self._channels)

    def examples(self, index_K: Tensor) -> Tensor:
        """Return examples of the stand-in."""
        return self._selection.lift(self._channels.index_select(0, index_K), 1)

    def weight_gradient(self, geometry: Geometry, grad: Tensor, weight_shape: Sequence[int]) -> Tensor:
        """Return dW from the kept channels, in place."""
        axis = 0 if geometry.transposed else 1
        kept_shape = list(weight_shape)
        kept_shape[axis] = self._channels.shape[1]
        if kept_shape[axis] == 0:
            return grad.new_zeros(weight_shape)
        return self._selection.lift(geometry.weight_gradient(self._channels, grad, kept_shape), axis)


def is_rounded_in_place(strategy: AbstractStrategy | None, images: Tensor) -> bool:
    """Tell whether images are encoded in memory order; those with channels last are a matrix of pixels as they lie."""
    return isinstance(strategy, StochasticRounding) and images.is_contiguous()


def keep_images(plan: Plan, images: Tensor) -> tuple[Tensor, ...]:
    """Return what is kept of images ``[B, I, ...]``, as plain tensors."""
    if isinstance(plan.stored, StochasticRounding) and is_rounded_in_place(plan.stored, images):
        with torch.no_grad():
            return plan.stored.store_images(images.detach())
    return plan.keep(as_matrix(images), images.shape[0])


def entry_variance_of(codec: StochasticRounding, images: Tensor) -> Tensor:
    """Return the variance of every entry's stand-in, in the shape of the images."""
    if is_rounded_in_place(codec, images):
        return codec.entry_variance(images.flatten(1)).view(images.shape)
    return as_images(codec.entry_variance(as_matrix(images)), images.shape)


def restore_images(
    plan: Plan,
    kept: tuple[Tensor, ...],
    geometry: Geometry,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    in_place: bool,
) -> AbstractKeptImages:
    """Return kept tensors as the cheapest stand-in for the input of the given shape.

    Args:
        plan: the strategies.
        kept: what `keep_images` returned.
        geometry: the convolution.
        shape: of the input.
        dtype: of the stand-in.
        in_place: what `is_rounded_in_place` said of the input.
    """
    strategy = plan.stored
    if in_place:
        return RoundedImages(plan.restore(kept, shape[0], math.prod(shape[1:]), dtype), kept, shape)
    if strategy is None:
        return WholeImages(kept[0])
    if isinstance(strategy, ExampleSample):
        return KeptExamples(kept, shape)
    if isinstance(strategy, FeatureSample) and strategy.rows_per_mask is None and geometry.groups == 1:
        return KeptChannels(kept, shape)
    rows = shape[0] * math.prod(shape[2:])
    return StandInImages(plan.restore(kept, rows, shape[1], dtype), kept, shape)
