"""Ends of spectra and densities against dense eigenvalue problems."""

from __future__ import annotations

import math

import pytest
import torch

from cheapgrad.curvature import (
    DenseOperator,
    Eigenpairs,
    LanczosSettings,
    SpectralDensity,
    as_operator,
    bottom_eigenpairs,
    spectral_density,
    top_eigenpairs,
    top_singular_values,
)
from cheapgrad.curvature.spectra.krylov import KrylovSpace
from cheapgrad.errors import BudgetError, NotConvergedWarning, OperatorError

F64 = torch.float64


def _with_eigenvalues(values: torch.Tensor) -> torch.Tensor:
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=F64))
    matrix = basis @ torch.diag(values.double()) @ basis.T
    return (matrix + matrix.T) / 2


SPECTRA = {
    "outliers and a bulk": torch.cat([torch.tensor([50.0, 20.0, 8.0, -6.0]), torch.linspace(-1, 1, 116)]),
    "indefinite": torch.linspace(-3, 2, 120),
    "wide range": torch.logspace(-10, 3, 120),
    "low rank": torch.cat([torch.tensor([4.0, 3.0, 2.0]), torch.zeros(117)]),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_both_ends_equal_those_of_the_dense_matrix(name: str) -> None:
    matrix = _with_eigenvalues(SPECTRA[name])
    truth = torch.linalg.eigvalsh(matrix)
    settings = LanczosSettings(tolerance=1e-9, products=120)
    count = 3
    scale = float(truth.abs().max())
    for pairs, expected in (
        (top_eigenpairs(matrix, count, settings=settings), truth.flip(0)[:count]),
        (bottom_eigenpairs(matrix, count, settings=settings), truth[:count]),
        (top_singular_values(matrix, count, settings=settings), truth.abs().sort(descending=True).values[:count]),
    ):
        assert pairs.converged
        torch.testing.assert_close(pairs.values, expected, rtol=0, atol=1e-8 * scale)
        gram = pairs.vectors.T @ pairs.vectors
        torch.testing.assert_close(gram, torch.eye(count, dtype=F64), rtol=0, atol=1e-10)
        # Residuals are what they say, up to rounding.
        signed = (pairs.vectors * (matrix @ pairs.vectors)).sum(0)
        measured = (matrix @ pairs.vectors - signed * pairs.vectors).norm(dim=0)
        assert (measured <= pairs.residuals + 1e-12 * scale).all()


def test_an_eigenvalue_lies_within_the_residual() -> None:
    """Also where the iteration stopped early, and that is said."""
    matrix = _with_eigenvalues(SPECTRA["indefinite"])
    truth = torch.linalg.eigvalsh(matrix)
    with pytest.warns(NotConvergedWarning, match="after 10 products, eigenpairs of a 120×120 matrix"):
        pairs = top_eigenpairs(matrix, 4, settings=LanczosSettings(products=10))
    assert not pairs.converged
    assert pairs.products == 10
    distance = (truth[:, None] - pairs.values).abs().min(0).values
    assert (distance <= pairs.residuals).all()
    assert torch.equal(pairs.standard_error, pairs.residuals)
    measured = (matrix @ pairs.vectors - pairs.values * pairs.vectors).norm(dim=0)
    torch.testing.assert_close(measured, pairs.residuals, rtol=1e-8, atol=1e-10)


def test_the_basis_stays_orthogonal_after_convergence() -> None:
    """Without reorthogonalisation, rounding spoils the basis once the outliers have converged."""
    operator = DenseOperator(_with_eigenvalues(SPECTRA["outliers and a bulk"]))
    for block in (1, 3):
        space = KrylovSpace(operator, block, None)
        while space.products < 90:
            space.extend(90)
        basis = space._basis_KP
        torch.testing.assert_close(basis @ basis.T, torch.eye(90, dtype=F64), rtol=0, atol=1e-13)


def test_blocks_find_multiple_eigenvalues() -> None:
    matrix = _with_eigenvalues(torch.cat([torch.tensor([5.0, 5.0, 5.0, 4.0]), torch.linspace(0, 1, 76)]))
    expected = torch.tensor([5.0, 5.0, 5.0, 4.0], dtype=F64)
    pairs = top_eigenpairs(matrix, 4, settings=LanczosSettings(block=3, tolerance=1e-8))
    torch.testing.assert_close(pairs.values, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("block", [1, 2, 7])
def test_invariant_starts_go_on_with_new_directions(block: int) -> None:
    """The identity is exhausted after one product; zero has nothing to multiply."""
    settings = LanczosSettings(block=block)
    torch.testing.assert_close(top_eigenpairs(torch.eye(5), 5, settings=settings).values, torch.ones(5, dtype=F64))
    assert top_eigenpairs(torch.zeros(4, 4), 4, settings=settings).values.abs().max() == 0
    values = torch.tensor([2.0, 2.0, 1.0, 1.0])
    assert top_eigenpairs(torch.diag(values), 4, settings=settings).values.tolist() == pytest.approx(values.tolist())


def test_single_precision_reaches_its_rounding() -> None:
    matrix = _with_eigenvalues(SPECTRA["outliers and a bulk"])
    pairs = top_eigenpairs(matrix.float(), 3)
    assert pairs.values.tolist() == pytest.approx([50.0, 20.0, 8.0], rel=1e-5)
    assert pairs.vectors.dtype == torch.float32


def test_matrices_that_are_not_symmetric_are_found_out() -> None:
    class Skewed:
        shape, dtype, device = (30, 30), F64, torch.device("cpu")

        def __init__(self) -> None:
            self.matrix = torch.randn(30, 30, dtype=F64)

        def __matmul__(self, columns: torch.Tensor) -> torch.Tensor:
            return self.matrix @ columns

    with pytest.raises(OperatorError, match="not symmetric, or not the same in every product: after 2 products"):
        top_eigenpairs(as_operator(Skewed()))
    with pytest.raises(OperatorError, match="after 3 products"):
        top_eigenpairs(as_operator(Skewed()), settings=LanczosSettings(block=3))


def test_a_quadrature_is_exact_for_polynomials_of_its_degree() -> None:
    """Each probe's own: P zᵀp(A)z / zᵀz, for a degree below twice the steps."""
    matrix = _with_eigenvalues(torch.linspace(-1, 2, 30))
    density = spectral_density(matrix, probes=3, steps=4, generator=torch.Generator().manual_seed(2))
    starts = torch.randn(30, 3, generator=torch.Generator().manual_seed(2), dtype=F64)
    for degree in range(8):
        power = torch.linalg.matrix_power(matrix, degree)
        expected = 30 * (starts * (power @ starts)).sum(0) / starts.square().sum(0)
        found = density.integrate(lambda x, degree=degree: x**degree)
        assert found.value == pytest.approx(float(expected.mean()), rel=1e-10)
        assert found.standard_error == pytest.approx(float(expected.std()) / math.sqrt(3), rel=1e-6, abs=1e-9)
    assert (density.products, density.dimension) == (12, 30)
    truth_8 = float(torch.linalg.matrix_power(matrix, 8).trace())
    assert abs(density.integrate(lambda x: x**8).value - truth_8) > 1e-6


def test_the_log_determinant_is_within_its_standard_error() -> None:
    matrix = _with_eigenvalues(torch.logspace(-2, 1, 60))
    density = spectral_density(matrix, probes=40, steps=30)
    found = density.integrate(torch.log)
    truth = float(torch.logdet(matrix))
    assert found.standard_error < 0.1 * abs(truth)
    assert abs(found.value - truth) < 4 * found.standard_error


def test_the_density_has_its_mass_where_eigenvalues_are() -> None:
    matrix = _with_eigenvalues(torch.cat([torch.full((40,), 1.0), torch.full((20,), 3.0)]))
    density = spectral_density(matrix, probes=60, steps=5)
    points = torch.linspace(0, 4, 801)
    values, errors = density.evaluate(points, width=0.05)
    step = 4 / 800
    assert float(values.sum()) * step == pytest.approx(1, rel=1e-3)
    mass = float(values[points > 2].sum()) * step
    share = density.integrate(lambda x: (x > 2).double())
    assert mass == pytest.approx(share.value / 60, rel=1e-3)
    assert abs(share.value - 20) < 4 * share.standard_error
    assert errors.shape == (801,)
    default, _ = density.evaluate(points)
    assert float(default.sum()) * step == pytest.approx(1, rel=1e-2)


def test_records_survive_a_round_trip() -> None:
    matrix = _with_eigenvalues(torch.arange(1, 6))
    pairs = top_eigenpairs(matrix, 2)
    again = Eigenpairs.from_dict(pairs.to_dict())
    assert torch.equal(again.values, pairs.values)
    assert torch.equal(again.vectors, pairs.vectors)
    assert (again.products, again.converged) == (pairs.products, True)
    density = spectral_density(matrix, probes=2, steps=3)
    other = SpectralDensity.from_dict(density.to_dict())
    assert torch.equal(other.nodes, density.nodes)
    assert torch.equal(other.weights, density.weights)


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(BudgetError, match="count=6 is more than the 5 dimensions"):
        top_eigenpairs(torch.eye(5), 6)
    with pytest.raises(BudgetError, match="count must be a whole number of at least 1, but got 0"):
        bottom_eigenpairs(torch.eye(5), 0)
    with pytest.raises(BudgetError, match=r"tolerance must be positive, but got -0\.1"):
        LanczosSettings(tolerance=-0.1)
    with pytest.raises(BudgetError, match="block must be a whole number of at least 1, but got 0"):
        LanczosSettings(block=0)
    with pytest.raises(BudgetError, match="products must be a whole number of at least 1, but got 0"):
        LanczosSettings(products=0)
    with pytest.raises(BudgetError, match="probes must be a whole number of at least 2, but got 1"):
        spectral_density(torch.eye(5), probes=1)
    with pytest.raises(BudgetError, match=r"must be positive, but is -1\.0"):
        spectral_density(torch.eye(5), probes=2, steps=1).evaluate(torch.ones(1), width=-1.0)
