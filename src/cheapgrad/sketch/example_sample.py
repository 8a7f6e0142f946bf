"""Sampling whole examples: all tokens or pixels of an example are kept or dropped together."""

from __future__ import annotations

from dataclasses import dataclass

from cheapgrad.sketch._row_sampling import AbstractRowSampling
from cheapgrad.sketch.law import Law


@dataclass(frozen=True, repr=False)
class ExampleSample(AbstractRowSampling):
    r"""Keep a share of the examples (the first axis of the input), weighted to stand for all.

    The same estimator as `RowSample` with all T rows of an example as one atom. The unit of variance-controlled
    sampling; for token models it has a higher variance than `RowSample` at the same cost, and it is what
    convolutions can save time with, because whole pictures stay dense.

    Args:
        keep: share of examples kept, in (0, 1].
        scores: scores of rows; an example's score is their Euclidean norm.
        design: as in `RowSample`.

    **Law** Bias 0. ``Var dX = sum_b (1/p_b - 1) ||G_b W||**2``;
    ``Var dW = sum_bc (p_bc / (p_b p_c) - 1) <G_b.T X_b, G_c.T X_c>``. Products cost a share K / B of the exact ones.

    Raises:
        BudgetError: if `keep` is not in (0, 1].

    >>> ExampleSample(keep=0.5).block_length(rows=128, examples=4)
    32

    References:
        SampleA of variance-controlled adaptive sampling, arXiv:2402.17227 (Bernoulli); ours has a fixed size.
    """

    @property
    def law(self) -> Law:
        """Bias, variance and cost."""
        return self._law(
            "whole examples of the cotangent, or of what is stored of X",
            "dX: Σ(1/p_b − 1)‖G_bW‖²;  dW: Σ_bc(p_bc/(p_bp_c) − 1)⟨G_bᵀX_b, G_cᵀX_c⟩",
        )

    def block_length(self, rows: int, examples: int) -> int:
        """An atom is all rows of one example."""
        return rows // max(examples, 1)
