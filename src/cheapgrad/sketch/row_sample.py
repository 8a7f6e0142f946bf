"""Sampling rows: the samples x tokens axis, for the cotangent or for what is stored."""

from __future__ import annotations

from dataclasses import dataclass

from cheapgrad.sketch._row_sampling import AbstractRowSampling
from cheapgrad.sketch.law import Law


@dataclass(frozen=True, repr=False)
class RowSample(AbstractRowSampling):
    r"""Keep a share of the rows, weighted to stand for all.

    As ``cotangent=`` (the strategy for time): rows are drawn at backward time with ``p_n = min(1, lambda s_n)`` and
    serve both products, ``dX_n = g_n W / p_n`` (zero elsewhere) and ``dW = sum_kept g_n x_n.T / p_n``. As ``stored=``:
    rows of X are drawn at forward time, blind to G; dX stays exact.

    Args:
        keep: share of rows kept, in (0, 1].
        scores: None takes ``CotangentNorm()`` at backward time, ``StoredNorm()`` at forward time.
        design: fixed size with exact inclusion probabilities by default.

    **Law** Bias 0. ``Var dX = sum_n (1/p_n - 1) ||g_n W||**2``;
    ``Var dW = sum_nm (p_nm / (p_n p_m) - 1) <g_n, g_m> <x_n, x_m>``. Products cost ``4 K I O`` instead of ``4 N I O``.

    Raises:
        BudgetError: if `keep` is not in (0, 1].

    >>> RowSample(keep=0.25).kept_count(2048)
    512

    References:
        Row sampling with data-dependent probabilities: arXiv:2402.17227 (Bernoulli, whole samples for dX),
        arXiv:2305.15265 (stored rows). Ours draws fixed sizes with exact marginals, for both products at once.
    """

    @property
    def law(self) -> Law:
        """Bias, variance and cost."""
        return self._law(
            "rows (samples x tokens) of the cotangent, or of what is stored of X",
            "dX: Σ(1/pₙ − 1)‖gₙW‖²;  dW: Σₙₘ(pₙₘ/(pₙpₘ) − 1)⟨gₙ,gₘ⟩⟨xₙ,xₘ⟩",
        )

    def block_length(self, rows: int, examples: int) -> int:
        """An atom is one row."""
        return 1
