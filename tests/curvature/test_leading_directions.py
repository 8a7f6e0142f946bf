"""Leading directions against dense eigenvectors."""

from __future__ import annotations

import pytest
import torch

from cheapgrad.curvature import DenseOperator
from cheapgrad.curvature.leading_directions import find_leading_directions


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_of_a_large_matrix(dtype, tolerance, largest):
    orthogonal_PP = torch.linalg.qr(torch.randn(600, 600, dtype=torch.float64)).Q
    spectrum_P = torch.cat([torch.linspace(5, 10, 8), -torch.linspace(3, 6, 8), torch.rand(584)]).double()
    matrix_PP = (orthogonal_PP * spectrum_P @ orthogonal_PP.T).to(dtype)
    operator = DenseOperator((matrix_PP + matrix_PP.T) / 2)
    values_K, vectors_PK = find_leading_directions(operator, 6, largest=largest)
    expected_K = spectrum_P.sort(descending=largest).values[:6].to(dtype)
    torch.testing.assert_close(values_K, expected_K, rtol=0, atol=tolerance)
    assert (operator @ vectors_PK - vectors_PK * values_K).norm(dim=0).max() < 10 * tolerance
    torch.testing.assert_close(vectors_PK.T @ vectors_PK, torch.eye(6, dtype=dtype), rtol=0, atol=tolerance)


def test_of_low_rank_goes_past_the_invariant_space():
    """Rank 3 in 500 dimensions: the Krylov space is exhausted after four steps, five directions are asked for."""
    rows = torch.randn(3, 500, dtype=torch.float64)
    values_K, vectors_PK = find_leading_directions(DenseOperator(rows.T @ rows), 5)
    expected = torch.linalg.svdvals(rows).square()
    torch.testing.assert_close(values_K, torch.cat([expected, torch.zeros(2, dtype=torch.float64)]))
    torch.testing.assert_close(vectors_PK.T @ vectors_PK, torch.eye(5, dtype=torch.float64))


def test_the_zero_matrix_has_directions_too():
    values_K, vectors_PK = find_leading_directions(DenseOperator(torch.zeros(500, 500)), 3)
    assert values_K.tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(vectors_PK.T @ vectors_PK, torch.eye(3))
