"""The curvature as an operator: products, solves, functions of the matrix, the finite population."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cheapgrad
from cheapgrad.curvature.finite_population import FinitePopulation
from cheapgrad.curvature.kronecker import (
    CategoricalOutputs,
    GaussianOutputs,
    KroneckerOptions,
    along_basis_of,
    ekfac,
    kfac,
)
from cheapgrad.errors import OperatorError, OverlapError, ShapeError, SingularCurvatureError
from cheapgrad.sketch import RowSample
from tests.curvature.kronecker.cases import NETWORKS, build, double, randn

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize("name", NETWORKS)
def test_products_and_solves_are_those_of_one_matrix(name: str) -> None:
    model, x, _ = build(name)
    curvature = ekfac(model, (x, torch.zeros(4)), CategoricalOutputs())
    dense, size = curvature.to_dense(), curvature.shape[0]
    torch.testing.assert_close(dense, dense.mT, **CLOSE)
    operand = randn(size, 3)
    torch.testing.assert_close(curvature @ operand, dense @ operand, **CLOSE)
    damped = dense + 0.1 * torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(curvature.solve(operand[:, 0], 0.1), torch.linalg.solve(damped, operand[:, 0]), **CLOSE)
    shifted = curvature.replace_eigenvalues(lambda _, values: values + 0.1)
    torch.testing.assert_close(shifted.log_determinant(), torch.linalg.slogdet(damped)[1], **CLOSE)
    torch.testing.assert_close(curvature.join(curvature.split(operand.mT)), operand.mT, rtol=0, atol=0)


def test_vectors_are_laid_out_as_the_selection_says() -> None:
    model, x, _ = build("mlp")
    options = KroneckerOptions(parameters=["4", "0.bias", "2"])
    curvature = kfac(model, (x, torch.zeros(4)), CategoricalOutputs(), options=options)
    assert curvature.selection.names == ("0.bias", "2.weight", "4.weight", "4.bias")
    assert curvature.shape == (5 + 15 + 9 + 3,) * 2
    # The last layer's block does not depend on which others were chosen.
    whole = kfac(model, (x, torch.zeros(4)), CategoricalOutputs())
    torch.testing.assert_close(curvature.to_dense()[-12:, -12:], whole.to_dense()[-12:, -12:], **CLOSE)


def test_frozen_parameters_may_be_named() -> None:
    model, x, _ = build("mlp")
    whole = kfac(model, (x, torch.zeros(4)), CategoricalOutputs())
    model.requires_grad_(False)
    named = kfac(model, (x, torch.zeros(4)), CategoricalOutputs(), options=KroneckerOptions(parameters=["0", "2", "4"]))
    torch.testing.assert_close(named.to_dense(), whole.to_dense(), **CLOSE)


def test_the_population_mixture_is_exact_when_both_batches_are_all_there_is() -> None:
    model, first, second = build("tokens")
    same = ekfac(model, (first, torch.zeros(4)), CategoricalOutputs())
    held_out = along_basis_of(same, model, (second, torch.zeros(3)), CategoricalOutputs())
    both = along_basis_of(same, model, (torch.cat([first, second]), torch.zeros(7)), CategoricalOutputs())
    corrected = held_out.correct_for_population(same, FinitePopulation(7, 4, 3))
    torch.testing.assert_close(corrected.to_dense(), both.to_dense(), **CLOSE)
    stranger = ekfac(model, (second, torch.zeros(3)), CategoricalOutputs())
    with pytest.raises(OperatorError, match="layer 'embed' has another basis"):
        held_out.correct_for_population(stranger, FinitePopulation(7, 4, 3))


def test_bases_are_told_apart_by_their_inputs_too() -> None:
    """With one output, all bases of the outputs are the same."""
    model = double(nn.Sequential(nn.Linear(3, 1)))
    same, other = (ekfac(model, (randn(5, 3, seed=seed), torch.zeros(5)), GaussianOutputs()) for seed in (1, 2))
    assert torch.equal(same.blocks[0].basis.outputs_QOO.abs(), other.blocks[0].basis.outputs_QOO.abs())
    with pytest.raises(OperatorError, match="layer '0' has another basis"):
        other.correct_for_population(same, FinitePopulation(10, 5, 5))


@pytest.mark.parametrize("builder", [kfac, ekfac])
def test_batches_that_overlap_are_named(builder: type) -> None:
    model, x, y = double(nn.Sequential(nn.Linear(4, 2))), randn(9, 4), torch.zeros(9)
    parts = [(x[start : start + 3], y[start : start + 3]) for start in (2, 4, 6)]
    with pytest.raises(OverlapError, match="1 of 3 eigenvalue batches share examples"):
        builder(model, (x[:4], y[:4]), GaussianOutputs(), eigenvalue_batches=parts)
    assert builder(model, (x[:4], y[:4]), GaussianOutputs(), eigenvalue_batches=parts[1:]).example_count == 6


def test_a_singular_system_without_damping_is_named() -> None:
    model = double(nn.Sequential(nn.Linear(4, 2)))
    curvature = kfac(model, (randn(2, 4), torch.zeros(2)), CategoricalOutputs())
    with pytest.raises(SingularCurvatureError, match=r"layer '0' has 8 of 10 eigenvalues .* damping=0.0"):
        curvature.solve(randn(10))
    assert torch.isfinite(curvature.solve(randn(10), 1e-3)).all()


def test_eigenvalues_of_another_shape_are_named() -> None:
    model, x, _ = build("mlp")
    curvature = kfac(model, (x, torch.zeros(4)), CategoricalOutputs())
    with pytest.raises(ShapeError, match=r"layer '0' have the shape \(1, 5, 5\), but the function returned \(5, 5\)"):
        curvature.replace_eigenvalues(lambda _, values: values[0])


def test_converted_layers_are_exact() -> None:
    def build_net() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3)).double()

    batch = (randn(64, 32), torch.zeros(64))
    expected = ekfac(build_net(), batch, CategoricalOutputs())
    model = build_net().train()
    handle = cheapgrad.approximate(model, cheapgrad.Rule("2", cotangent=RowSample(keep=0.25)), skip_small=False)
    found = ekfac(model, batch, CategoricalOutputs())
    torch.testing.assert_close(found.trace(), expected.trace(), **CLOSE)
    torch.testing.assert_close(found.to_dense(), expected.to_dense(), **CLOSE)
    assert [record.status for record in handle.rows] == ["converted"]
