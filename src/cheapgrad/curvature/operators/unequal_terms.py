"""Losses whose batches count by something else than their examples: class weights and ignored targets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cheapgrad.curvature.operators.likelihoods import Categorical
from cheapgrad.errors import BatchError


@dataclass(frozen=True)
class UnequalTerms:
    """Sees where a mean over batches by their examples would not be the mean over all terms.

    `torch.nn.CrossEntropyLoss` and `torch.nn.NLLLoss` divide by the summed weights of the targets that are not ignored.
    Where that sum is not the same for each target in every batch, batches have to count by it.

    Attributes:
        loss: any; others than these two and `Categorical` are not looked into.
        is_mended: whether batches count by ``BatchReader(size=...)``, and that puts the mean right.
    """

    loss: Any
    is_mended: bool

    def share_of(self, targets: Any) -> float | None:
        """Return the mean weight of a batch's targets, ignored ones having none; None where it need not be known."""
        if self.is_mended:
            return None
        if not isinstance(self.loss, nn.CrossEntropyLoss | nn.NLLLoss | Categorical):
            return None
        if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.numel() == 0:
            return None
        kept = targets[targets != self.loss.ignore_index]
        weight = getattr(self.loss, "weight", None)
        if weight is None:
            return kept.numel() / targets.numel()
        # The loss itself has better words for a class out of range.
        if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < len(weight):
            return None
        return float(weight[kept.to(weight.device)].double().sum()) / targets.numel()

    def compare(self, first: float | None, share: float | None, index: int) -> None:
        """Raise `BatchError` if a batch's share is not that of the first one."""
        if first is None or share is None or math.isclose(first, share, rel_tol=1e-6):
            return
        raise BatchError(
            f"a {type(self.loss).__name__} that weighs classes or ignores targets divides by the weight of what "
            f"counts: {first:.6g} for each target in batch 0, but {share:.6g} in batch {index}, so a mean by examples "
            "would depend on how they are batched; give all examples as one batch, or (not for an EmpiricalFisher) "
            "BatchReader(size=...) that returns this weight, e.g. lambda batch: (batch[1] != ignore_index).sum()"
        )
