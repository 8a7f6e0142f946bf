"""Trace from a sketch of the range, and random signs for the rest."""

from __future__ import annotations

from typing import Any

import torch

from cheapgrad.curvature.spectra.estimates import ScalarEstimate, summarize_draws
from cheapgrad.curvature.spectra.probes import check_probes, check_within, draw_signs


def hutch_plus_plus(operator: Any, *, products: int = 48, generator: torch.Generator | None = None) -> ScalarEstimate:
    """Estimate the trace as that of ``QᵀAQ``, Q spanning a random sketch of the range, plus Hutchinson's on the rest.

    Args:
        operator: anything with ``shape`` and ``@``.
        products: to be spent, at least 6; a third each for the sketch, for its trace, and for the rest.
        generator: of the draws; torch's default otherwise. Processes of a group need equal ones.

    Returns:
        The estimate, with the standard error of the part that is random given the sketch.

    Law:
        Unbiased. For positive semi-definite matrices the error falls like ``tr A / products``, against
        ``tr A / √products`` for Hutchinson's, and faster where eigenvalues decay.

    Raises:
        BudgetError: if there are fewer than six products, or more than three for each dimension.

    Example:
        >>> from cheapgrad.curvature import DenseOperator
        >>> v = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
        >>> round(hutch_plus_plus(DenseOperator(torch.outer(v, v)), products=6).value, 6)
        39.0

    References:
        Meyer, Musco, Musco, Woodruff, Hutch++: optimal stochastic trace estimation, SOSA 2021, algorithm 1.
    """
    operator = check_probes(operator, "products", products, minimum=6)
    third = products // 3
    check_within(operator, "products", products, share=3)
    basis_PR, _ = torch.linalg.qr(operator @ draw_signs(operator, third, generator))
    inside = (basis_PR * (operator @ basis_PR)).sum()
    signs_PR = draw_signs(operator, third, generator)
    rest_PR = signs_PR - basis_PR @ (basis_PR.T @ signs_PR)
    forms_R = (rest_PR * (operator @ rest_PR)).sum(0)
    return summarize_draws(inside + forms_R, 3 * third, "hutch_plus_plus")
