"""What every entry of the table has to show, from a fixed number of draws of the weight gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.contexts.table import Row

# Some 6,000 comparisons in the whole table at a family level of 1e-6.
LARGEST_Z = 6.5
# A standard error of more than 3 % of the truth decides nothing.
LARGEST_ERROR = 0.03


def check_draws(row: Row, draws: Tensor, tolerance: float = 1e-4) -> None:
    """Check that the draws of dW ``[draws, weight shape]`` are fresh, select the same rows twice, and are unbiased."""
    matrices = row.layer.matrix(draws.cpu().double())
    exact = row.layer.expected()
    assert torch.isfinite(matrices).all()
    # Eight bits hold the identity up to the rounding of bfloat16: no two draws differ, for none has an error.
    is_exact = torch.allclose(matrices[0], exact, atol=tolerance)
    assert is_exact or (matrices[1:] != matrices[:-1]).any(), "every step used the same draw"
    if row.placement.selects:
        off_diagonal = matrices - torch.diag_embed(matrices.diagonal(dim1=1, dim2=2))
        assert off_diagonal.abs().max() == 0, "forward and backward did not use the same sample"
    check_mean(matrices, exact, tolerance)


def check_mean(draws: Tensor, exact: Tensor, tolerance: float) -> None:
    """Compare the mean with the exact matrix, along itself and along fixed random directions."""
    along, error = _mean_and_error((draws * exact).sum((1, 2)) / exact.square().sum())
    assert error < LARGEST_ERROR, f"inconclusive: standard error {error:.3f}"
    assert abs(along - 1) < LARGEST_Z * error + tolerance, f"mean {along:.4f} ± {error:.4f}, not 1"
    generator = torch.Generator().manual_seed(17)
    signs = torch.randint(0, 2, (8, *exact.shape), generator=generator).double() * 2 - 1
    for direction in signs:
        error_along = ((draws - exact) * direction).sum((1, 2)) / exact.norm()
        mean, error = _mean_and_error(error_along)
        assert abs(mean) < LARGEST_Z * error + 4 * tolerance, f"bias {mean:.4f} ± {error:.4f} along a direction"


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / values.shape[0] ** 0.5
