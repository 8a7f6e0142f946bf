"""Laws: bias, variance and cost of a strategy, stated once as code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cheapgrad.sketch.moment import Moment


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a layer: ``X: [rows, inputs]``, ``W: [outputs, inputs]``, ``G: [rows, outputs]``.

    Attributes:
        rows: N.
        inputs: I.
        outputs: O.
        examples: B, the number of consecutive blocks the rows form.
        element_bytes: bytes per element of X (4 for float32).
    """

    rows: int
    inputs: int
    outputs: int
    examples: int = 1
    element_bytes: int = 4


@dataclass(frozen=True)
class LayerTensors:
    """The tensors a variance is a function of.

    Grouped layers stack their groups Q in front: ``stored_QNI``, ``cotangent_QNO``; a plain linear layer has Q = 1 and
    may pass matrices.

    Attributes:
        stored_QNI: X.
        cotangent_QNO: G.
        weight_OI: W, or None where the input needs no gradient.
        examples: B.
        predicted_norm_N: see `Operands`.
    """

    stored_QNI: Tensor
    cotangent_QNO: Tensor
    weight_OI: Tensor | None = None
    examples: int = 1
    predicted_norm_N: Tensor | None = None


@dataclass(frozen=True)
class Variance:
    """Expected squared errors, summed over all entries.

    Attributes:
        input: ``E ||dX_hat - dX||**2`` (0-dim float64), for one layer whose cotangent is exact.
        weight: ``E ||dW_hat - dW||**2`` (0-dim float64).
    """

    input: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Law:
    """What a strategy promises, as data: docs, audit, planner and tests read this object and nothing else.

    Attributes:
        estimates: what the strategy stands in for.
        bias: bias of dX and dW given exact inputs; 0.0 for every strategy shipped here.
        formula: the variance as text, for tables and pages.
        fails_when: where the law does not hold.
        moments: where the strategy may be placed, its usual moment first.
    """

    estimates: str
    bias: float
    formula: str
    fails_when: str
    moments: tuple[Moment, ...]
    _variance: Callable[[LayerTensors, Moment], Variance]
    _flops: Callable[[LayerShape, Moment], float]
    _saved_bytes: Callable[[LayerShape, Moment], float]

    def variance(
        self,
        stored_NI: Tensor,
        cotangent_NO: Tensor,
        weight_OI: Tensor | None = None,
        *,
        moment: Moment | None = None,
        examples: int = 1,
        predicted_norm_N: Tensor | None = None,
    ) -> Variance:
        """Return the expected squared errors of dX and dW for these tensors.

        Args:
            stored_NI: X, shape ``[N, I]`` or ``[Q, N, I]``.
            cotangent_NO: G, shape ``[N, O]`` or ``[Q, N, O]``.
            weight_OI: W ``[O, I]``; None where the input needs no gradient.
            moment: where the strategy is placed; its usual moment if left out.
            examples: B, for strategies that see examples.
            predicted_norm_N: predicted row norms of the cotangent, for scores that use them.
        """
        tensors = LayerTensors(stored_NI, cotangent_NO, weight_OI, examples, predicted_norm_N)
        return self._variance(tensors, moment or self.moments[0])

    def flops(self, shape: LayerShape, moment: Moment | None = None) -> float:
        """Return the FLOPs of the backward products dX and dW (multiply and add count 1 each), sketching included."""
        return self._flops(shape, moment or self.moments[0])

    def saved_bytes(self, shape: LayerShape, moment: Moment | None = None) -> float:
        """Return the bytes held for backward in place of X (weights are not counted: they exist anyway)."""
        return self._saved_bytes(shape, moment or self.moments[0])


def dense_flops(shape: LayerShape) -> float:
    """Return the FLOPs of exact dX and dW: ``2 N I O`` each."""
    return 4.0 * shape.rows * shape.inputs * shape.outputs


def dense_bytes(shape: LayerShape) -> float:
    """Return the bytes of X."""
    return float(shape.rows * shape.inputs * shape.element_bytes)
