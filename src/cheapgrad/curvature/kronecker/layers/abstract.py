"""What a kind of layer has to say so that its parameters get Kronecker factors."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from cheapgrad.curvature.kronecker.rows import AbstractRows
from cheapgrad.errors import ShapeError


@dataclass(frozen=True)
class Use:
    """One call of a layer.

    Attributes:
        rows: activations, detached.
        output: the tensor whose cotangent is asked for.
        normalised_BTD: what a norm's scale multiplied, where the layer is a norm.
    """

    rows: AbstractRows
    output: Tensor
    normalised_BTD: Tensor | None = None


class AbstractLayer(abc.ABC):
    """One module and those of its parameters that are chosen, as a block of Q groups of matrices ``[O, I]``.

    Args:
        name: of the module in the model.
        module: it.
        chosen: names of its own parameters that take part, such as ``{"weight", "bias"}``.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]]
    """Module classes that this handles, with the classes derived from them."""

    def __init__(self, name: str, module: nn.Module, chosen: frozenset[str]) -> None:
        self.name, self.module, self.chosen = name, module, chosen
        self.parameter_names = tuple(own for own, _ in module.named_parameters(recurse=False) if own in chosen)

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """Q, O and I of the block."""

    @property
    def is_input_diagonal(self) -> bool:
        """Whether the activations' second moment is a diagonal, as for embeddings."""
        return False

    @abc.abstractmethod
    def find_obstacle(self) -> str | None:
        """Return why this module's setting is not supported, or None."""

    @abc.abstractmethod
    def read_use(self, x: Tensor, output: Tensor, examples: int) -> Use:
        """Return the rows of one call on `x`, of that many examples."""

    @abc.abstractmethod
    def read_cotangent(self, use: Use, cotangent: Tensor) -> Tensor:
        """Return the cotangent of the call's output as rows ``[Q, B, T, O]``."""

    @abc.abstractmethod
    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return tensors like the chosen parameters, by own name, as a block ``[..., Q, O, I]``.

        The tensors may have the same leading axes each.
        """

    @abc.abstractmethod
    def unpack(self, block_QOI: Tensor) -> dict[str, Tensor]:
        """Return a block ``[..., Q, O, I]`` as tensors like the chosen parameters: the inverse of `pack`."""

    def _check_examples(self, x: Tensor, examples: int) -> None:
        if x.ndim == 0 or x.shape[0] != examples:
            raise ShapeError(
                f"layer {self.name!r} ({type(self.module).__name__}) was called on a tensor of shape {tuple(x.shape)} "
                f"in a batch of {examples} examples; the first axis has to be the examples, so expand what all "
                "examples share, and keep positions on an axis of their own"
            )


def append_one(rows_QBTI: Tensor) -> Tensor:
    """Append to every row the one that a bias multiplies."""
    return torch.cat([rows_QBTI, rows_QBTI.new_ones(*rows_QBTI.shape[:-1], 1)], -1)
