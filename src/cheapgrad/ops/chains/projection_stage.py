"""The projections of `nn.MultiheadAttention` as a stage: linear maps whose rows PyTorch puts in another order."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cheapgrad.ops.chains.linear_stage import LinearStage
from cheapgrad.ops.chains.stage import AbstractOpenedStage, AbstractStage, KeptRows, Rebuild
from cheapgrad.ops.plan import RootUse
from cheapgrad.sketch import AbstractStrategy
from cheapgrad.sketch.transforms import is_transformed


@dataclass(frozen=True)
class ProjectionStage(AbstractStage):
    """``Y = X W.T + b`` with parameters weight ``[O, I]`` and bias ``[O]`` or None.

    Attributes:
        stored: codec for what is kept of X, or None to keep X.
        is_flat: multiply rows as one matrix.
        is_turned: multiply with the first two axes of X in turned order, as attention does where the batch comes first;
            the output has the order of X.
        parts: how many projections lie side by side in W; more than one, and the output is ``[parts, ...]``, in turned
            order, each of them in one piece.
        use: told when the input is kept for others, or None.
    """

    stored: AbstractStrategy | None = None
    is_flat: bool = False
    is_turned: bool = False
    parts: int = 1
    use: RootUse | None = field(default=None, compare=False, repr=False)

    @property
    def rebuilds_output(self) -> bool:
        """No: a product is too dear to be formed twice."""
        return False

    @property
    def multiplies(self) -> bool:
        """Yes: this is where sampled rows save time."""
        return True

    @property
    def _plain(self) -> LinearStage:
        return LinearStage(self.stored, self.is_flat)

    def forward(self, x: Tensor, parameters: tuple[Tensor | None, ...]) -> Tensor:
        """Return the projection, bit for bit as PyTorch does: the same product of the same matrices."""
        rows = self._plain.forward(x.transpose(0, 1) if self.is_turned else x, parameters)
        if self.parts > 1:
            return unpack(rows, self.parts)
        return _own_tensor(rows.transpose(0, 1)) if self.is_turned else rows

    def record(self, x: Tensor, parameters: tuple[Tensor | None, ...], is_rebuilt: bool) -> tuple[Tensor, ...]:
        """Return X, or its codes; nothing where X is rebuilt or the weight is frozen."""
        return self._plain.record(x, parameters, is_rebuilt)

    def open(
        self,
        record: tuple[Tensor, ...],
        parameters: tuple[Tensor | None, ...],
        rows: KeptRows,
        rebuild: Rebuild | None,
    ) -> AbstractOpenedStage:
        """Return the stage, with a way to its input; backward does not care for the order of rows."""
        return self._plain.open(record, parameters, rows, rebuild)


def unpack(packed: Tensor, parts: int) -> Tensor:
    """Return ``[..., parts * E]`` as ``[parts, ..., E]``, copied as PyTorch copies it."""
    apart = packed.unflatten(-1, (parts, packed.shape[-1] // parts))
    return apart.unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()


def _own_tensor(view: Tensor) -> Tensor:
    """Return the same entries in memory, not marked as a view: those made inside a function may not be overwritten."""
    if torch.compiler.is_compiling() or is_transformed(view) or type(view) is not Tensor:
        return view
    return view.new_empty(0).set_(view.untyped_storage(), view.storage_offset(), view.shape, view.stride())
