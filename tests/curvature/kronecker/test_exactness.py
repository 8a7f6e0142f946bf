"""Factors and corrected eigenvalues against dense matrices of torch.func, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cheapgrad.curvature.kronecker import (
    CategoricalOutputs,
    EmpiricalFisher,
    GaussianOutputs,
    KroneckerCurvature,
    KroneckerOptions,
    SampledFisher,
    WeightSharing,
    along_basis_of,
    ekfac,
    kfac,
)
from tests.curvature.kronecker.cases import NETWORKS, Averaged, build, class_loss, double, randn, squared_loss
from tests.oracles.per_example import example_jacobians, gauss_newton, output_hessians

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def _blocks(dense: Tensor, curvature: KroneckerCurvature) -> Tensor:
    """Return the dense matrix without what couples layers, or groups of a convolution."""
    size = curvature.shape[0]
    owner = torch.zeros(size, dtype=torch.float64)
    marks = {}
    for position, block in enumerate(curvature.blocks):
        Q, O, I = block.layer.shape
        marks[block.layer.name] = (torch.arange(Q)[:, None, None] + 100.0 * position).expand(Q, O, I).double()
    owner = curvature.join(marks)
    return dense * (owner[:, None] == owner[None, :])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("variance", [1.0, 0.25])
def test_kfac_is_exact_on_deep_linear_networks(bias: bool, variance: float) -> None:
    model = double(nn.Sequential(nn.Linear(4, 3, bias=bias), nn.Linear(3, 5, bias=bias), nn.Linear(5, 2, bias=bias)))
    x = randn(7, 4)
    curvature = kfac(model, (x, torch.zeros(7, 2)), GaussianOutputs(variance))
    dense = gauss_newton(model, x, squared_loss, curvature.selection.names) / variance
    torch.testing.assert_close(curvature.to_dense(), _blocks(dense, curvature), **CLOSE)


def test_expanded_kfac_is_exact_on_deep_linear_networks_with_a_loss_per_position() -> None:
    model = double(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    x = randn(5, 3, 3)
    curvature = kfac(model, (x, torch.zeros(5)), GaussianOutputs())
    dense = gauss_newton(model, x, squared_loss, curvature.selection.names)
    torch.testing.assert_close(curvature.to_dense(), _blocks(dense, curvature), **CLOSE)
    # A biased twin: with positions reduced it is another matrix.
    reduced = kfac(
        model, (x, torch.zeros(5)), GaussianOutputs(), options=KroneckerOptions(sharing=WeightSharing.REDUCE)
    )
    assert (reduced.to_dense() - _blocks(dense, curvature)).norm() > 0.1 * dense.norm()


@pytest.mark.parametrize("kind", ["linear", "convolution", "grouped convolution"])
def test_reduced_kfac_is_exact_on_deep_linear_networks_that_average_positions(kind: str) -> None:
    groups = 2 if kind == "grouped convolution" else 1
    if kind == "linear":
        model, x = Averaged(nn.Linear(3, 4), nn.Linear(4, 2), axis=1), randn(5, 6, 3)
    else:
        layers = (nn.Conv2d(4, 6, (2, 3), groups=groups), nn.Conv2d(6, 2, 1))
        model, x = Averaged(*layers, axis=(2, 3)), randn(5, 4, 4, 5)  # type: ignore[arg-type]
    double(model)
    options = KroneckerOptions(sharing=WeightSharing.REDUCE)
    curvature = kfac(model, (x, torch.zeros(5)), GaussianOutputs(), options=options)
    dense = gauss_newton(model, x, squared_loss, curvature.selection.names)
    torch.testing.assert_close(curvature.to_dense(), _blocks(dense, curvature), **CLOSE)


def test_one_example_is_exact_under_any_likelihood() -> None:
    model, x, _ = build("mlp")
    curvature = kfac(model, (x[:1], torch.zeros(1)), CategoricalOutputs())
    dense = gauss_newton(model, x[:1], class_loss, curvature.selection.names)
    torch.testing.assert_close(curvature.to_dense(), _blocks(dense, curvature), **CLOSE)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("likelihood", [CategoricalOutputs(), GaussianOutputs()])
def test_corrected_eigenvalues_are_quadratic_forms_of_the_second_batch(
    name: str, likelihood: CategoricalOutputs | GaussianOutputs
) -> None:
    model, first, second = build(name)
    loss = class_loss if isinstance(likelihood, CategoricalOutputs) else squared_loss
    curvature = ekfac(model, (first, torch.zeros(4)), likelihood, eigenvalue_batches=(second, torch.zeros(3)))
    dense = gauss_newton(model, second, loss, curvature.selection.names)
    for block in curvature.blocks:
        values = block.eigenvalues_QOI
        directions = block.basis.rotate_back(torch.eye(values.numel(), dtype=torch.float64).reshape(-1, *values.shape))
        vectors = curvature.join(
            {
                other.layer.name: directions if other is block else torch.zeros(len(directions), *other.layer.shape)
                for other in curvature.blocks
            }
        )
        forms = torch.einsum("kp,pq,kq->k", vectors, dense, vectors).reshape(values.shape)
        torch.testing.assert_close(values, forms, **CLOSE)
        # Directions are orthonormal, so that the trace is that of the second batch's block.
        torch.testing.assert_close(vectors @ vectors.mT, torch.eye(len(vectors), dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(curvature.trace(), dense.trace(), **CLOSE)
    assert abs(float(curvature.trace()) - float(ekfac(model, (first, torch.zeros(4)), likelihood).trace())) > 1e-3


@pytest.mark.parametrize("name", ["grouped cnn", "line cnn", "tokens", "sequence"])
def test_norms_are_exact(name: str) -> None:
    model, x, _ = build(name)
    norms = [key for key, module in model.named_modules() if "Norm" in type(module).__name__]
    options = KroneckerOptions(parameters=norms)
    curvature = kfac(model, (x, torch.zeros(4)), CategoricalOutputs(), options=options)
    dense = gauss_newton(model, x, class_loss, curvature.selection.names)
    torch.testing.assert_close(curvature.to_dense(), _blocks(dense, curvature), **CLOSE)


@pytest.mark.parametrize("name", NETWORKS)
def test_factors_along_a_basis_reduce_to_plain_kfac_on_the_same_batch(name: str) -> None:
    model, x, _ = build(name)
    batch = (x, torch.zeros(4))
    plain = kfac(model, batch, CategoricalOutputs())
    twice = kfac(model, batch, CategoricalOutputs(), eigenvalue_batches=batch)
    torch.testing.assert_close(plain.to_dense(), twice.to_dense(), **CLOSE)


def test_factor_wise_eigenvalues_are_those_of_the_second_batchs_factors() -> None:
    model, first, second = build("mlp")
    curvature = kfac(model, (first, torch.zeros(4)), CategoricalOutputs(), eigenvalue_batches=(second, torch.zeros(3)))
    target = kfac(model, (second, torch.zeros(3)), CategoricalOutputs()).to_dense()
    for block in curvature.blocks:
        values = block.eigenvalues_QOI
        directions = block.basis.rotate_back(torch.eye(values.numel(), dtype=torch.float64).reshape(-1, *values.shape))
        zeros = {other.layer.name: torch.zeros(values.numel(), *other.layer.shape) for other in curvature.blocks}
        vectors = curvature.join(zeros | {block.layer.name: directions})
        forms = torch.einsum("kp,pq,kq->k", vectors, target, vectors).reshape(values.shape)
        torch.testing.assert_close(values, forms, **CLOSE)


@pytest.mark.parametrize("builder", [kfac, ekfac])
def test_unequal_batches_are_one_batch(builder: type) -> None:
    model, x, _ = build("grouped cnn")
    whole = builder(model, (x, torch.zeros(4)), CategoricalOutputs())
    parts = builder(model, [(x[:1], torch.zeros(1)), (x[1:], torch.zeros(3))], CategoricalOutputs())
    torch.testing.assert_close(whole.to_dense(), parts.to_dense(), **CLOSE)
    assert parts.example_count == 4


def test_empirical_fisher_is_that_of_the_targets() -> None:
    model, x, _ = build("mlp")
    y = torch.tensor([0, 2, 1, 1])
    curvature = ekfac(model, (x, y), CategoricalOutputs(), options=KroneckerOptions(fisher=EmpiricalFisher()))
    jacobians = example_jacobians(model, x, curvature.selection.names)
    scores = model(x).softmax(-1) - nn.functional.one_hot(y, 3)
    trace = torch.einsum("bop,bo->bp", jacobians, scores).square().sum() / 4
    torch.testing.assert_close(curvature.trace(), trace, **CLOSE)


def test_sampled_fisher_is_unbiased_for_the_exact_one() -> None:
    model, x, _ = build("sequence")
    batch, draws = (x, torch.zeros(4)), 400
    exact = ekfac(model, batch, CategoricalOutputs())
    generator = torch.Generator().manual_seed(5)
    fisher = KroneckerOptions(fisher=SampledFisher(samples=1, generator=generator))
    traces = torch.stack(
        [along_basis_of(exact, model, batch, CategoricalOutputs(), options=fisher).trace() for _ in range(draws)]
    )
    error = traces.std() / draws**0.5
    # At 400 draws the interval is narrow enough to tell a missing factor of two.
    assert float(error) < 0.05 * float(exact.trace())
    assert abs(float(traces.mean() - exact.trace())) < 4 * float(error)
    twice = KroneckerOptions(fisher=SampledFisher(samples=200, generator=generator))
    many = along_basis_of(exact, model, batch, CategoricalOutputs(), options=twice).trace()
    assert abs(float(many - exact.trace())) < 4 * float(error) * 2


@pytest.mark.parametrize("likelihood", [CategoricalOutputs(), GaussianOutputs(0.3)])
@pytest.mark.parametrize("shape", [(2, 3), (2, 4, 3)])
def test_square_roots_square_to_the_hessian(
    likelihood: CategoricalOutputs | GaussianOutputs, shape: tuple[int, ...]
) -> None:
    outputs = randn(*shape)
    targets = likelihood.sample_targets(outputs, torch.Generator().manual_seed(0))
    hessians = output_hessians(lambda one: -likelihood.log_likelihood(one[None], targets[:1]).sum(), outputs)
    roots = likelihood.square_root(outputs)
    products = (roots @ roots.mT).reshape(shape[0], -1, 3, 3)
    for example in range(shape[0]):
        torch.testing.assert_close(torch.block_diag(*products[example]), hessians[example], **CLOSE)
    leaf = outputs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(-likelihood.log_likelihood(leaf, targets).sum(), leaf)
    torch.testing.assert_close(likelihood.score(outputs, targets), gradient, **CLOSE)
