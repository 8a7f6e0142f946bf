"""What all sampling strategies share: budget, scores, design, and the variances of sums of atoms."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from cheapgrad.errors import PlacementError, check_fraction
from cheapgrad.sketch._strategy import AbstractStrategy
from cheapgrad.sketch.budget import count_kept
from cheapgrad.sketch.designs import AbstractDesign, Systematic
from cheapgrad.sketch.designs._abstract import SquaredNormOfSum
from cheapgrad.sketch.law import LayerTensors, Variance
from cheapgrad.sketch.moment import Moment
from cheapgrad.sketch.operands import Operands, norm_along
from cheapgrad.sketch.running_norms import RunningRowNorms
from cheapgrad.sketch.scores import AbstractScore, CotangentNorm, PredictedNorm, StoredNorm, covered_scores


@dataclass(frozen=True, repr=False)
class AbstractSampling(AbstractStrategy):
    """A strategy that keeps a share of the atoms along one axis.

    Args:
        keep: share of the atoms to keep, in (0, 1]; 1 runs PyTorch's own code.
        scores: how much an atom matters; None takes the best one for the moment.
        design: how the sample is drawn.
    """

    keep: float
    scores: AbstractScore | None = None
    design: AbstractDesign = Systematic()

    #: Axis of the sketched matrix whose atoms are sampled: 0 rows, 1 columns.
    axis: ClassVar[int] = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", check_fraction("keep", self.keep))
        if self.scores is not None and not isinstance(self.scores, AbstractScore):
            raise PlacementError(
                f"scores must be a score such as CotangentNorm(), but got {self.scores!r}; see cheapgrad.sketch.scores"
            )
        if not isinstance(self.design, AbstractDesign):
            raise PlacementError(
                f"design must be a sampling design such as Systematic(), but got {self.design!r}; "
                "see cheapgrad.sketch.designs"
            )
        if self.scores is not None and self.axis not in self.scores.axes:
            axis = "rows" if self.axis == 0 else "columns"
            raise PlacementError(f"{self.scores!r} does not score {axis}, which {type(self).__name__} samples")

    @property
    def is_exact(self) -> bool:
        """Whether everything is kept."""
        return self.keep == 1.0

    def check_placement(self, moment: Moment) -> None:
        """Also refuse scores that look at a cotangent that does not exist yet."""
        super().check_placement(moment)
        if moment is Moment.COTANGENT and isinstance(self.scores, PredictedNorm):
            raise PlacementError(
                f"{self.scores!r} has no meaning in cotangent=: it predicts what backward time can see; "
                "use CotangentNorm(), ProductNorm() or JointNorm(), or put the strategy in stored="
            )
        if moment is Moment.STORED and self.scores is not None and self.scores.sees_cotangent:
            raise PlacementError(
                f"{self.scores!r} has no meaning in stored=: the cotangent does not exist at forward time; "
                "use StoredNorm(), PredictedNorm() or Uniform(), or put the strategy in cotangent="
            )

    def kept_count(self, size: int) -> int:
        """Return how many of `size` atoms are kept: the nearest whole number, at least one."""
        return count_kept(self.keep, size)

    def evaluate_scores(self, operands: Operands) -> Tensor:
        """Return the scores of the atoms, floored where their zeros are not zeros of the gradient."""
        default: AbstractScore = CotangentNorm() if operands.moment is Moment.COTANGENT else StoredNorm()
        return covered_scores(self.scores or default, operands, self.axis)

    def variance_with_memory(self, tensors: LayerTensors, moment: Moment, memory: Any) -> Variance:
        """Return the law's variance for the norms that the memory predicts."""
        if memory is not None:
            predicted_N = memory.predict(tensors.stored_QNI.shape[-2], tensors.examples, tensors.stored_QNI.device)
            tensors = dataclasses.replace(tensors, predicted_norm_N=predicted_N)
        return super().variance_with_memory(tensors, moment, memory)

    def observe(self, cotangent_NO: Tensor, examples: int, memory: Any) -> None:
        """Remember the cotangent's row norms where the scores predict them."""
        if memory is not None:
            memory.update(norm_along(cotangent_NO, 1), examples)

    def new_memory(self) -> Any:
        """Return running estimates where the scores predict the cotangent."""
        return RunningRowNorms(self.scores.momentum) if isinstance(self.scores, PredictedNorm) else None


def orthogonal_sum(squared_norms: Tensor) -> SquaredNormOfSum:
    """Return the squared norm of a weighted sum of mutually orthogonal atoms."""
    return lambda weights: (weights.double() ** 2 * squared_norms).sum()
