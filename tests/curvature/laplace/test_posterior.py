"""The posterior against closed forms: linear regression, dense matrices, enumeration, intervals with fixed draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cheapgrad.curvature.kronecker import (
    CategoricalOutputs,
    GaussianOutputs,
    KroneckerOptions,
    WeightSharing,
    ekfac,
    kfac,
)
from cheapgrad.curvature.laplace import (
    KroneckerLaplace,
    OutputDistribution,
    add_noise,
    fit_laplace,
    log_marginal_likelihood,
    predict_linearised,
    sample_outputs,
    sum_log_likelihood,
    tune_prior_precision,
)
from cheapgrad.errors import (
    BudgetError,
    OperatorError,
    SingularCurvatureError,
    StochasticModelError,
    UnknownNameError,
)
from tests.curvature.kronecker.cases import NETWORKS, build, double, randn
from tests.oracles.per_example import example_jacobians

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def _posterior(name: str, prior: float = 0.7) -> tuple[KroneckerLaplace, Tensor]:
    model, first, second = build(name)
    batch, other = (first, torch.zeros(4)), (second, torch.zeros(3))
    curvature = ekfac(model, batch, CategoricalOutputs(), eigenvalue_batches=other)
    return fit_laplace(model, curvature, CategoricalOutputs(), dataset_size=50, prior_precision=prior), first


def _regression(noise: float, prior: float) -> tuple[nn.Linear, Tensor, Tensor]:
    """Return a linear model at the mode of its posterior, with its data."""
    x, y = randn(12, 3, seed=7), randn(12, 1, seed=8)
    model = nn.Linear(3, 1, bias=False).double()
    precision = x.mT @ x / noise + prior * torch.eye(3, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.solve(precision, x.mT @ y / noise).mT)
    return model, x, y


@pytest.mark.parametrize("prior", [0.5, 4.0])
def test_linear_regression_is_exact(prior: float) -> None:
    noise = 0.3
    model, x, y = _regression(noise, prior)
    likelihood = GaussianOutputs(noise)
    posterior = fit_laplace(model, kfac(model, (x, y), likelihood), likelihood, dataset_size=12, prior_precision=prior)
    precision = x.mT @ x / noise + prior * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(posterior.covariance.to_dense(), torch.linalg.inv(precision), **CLOSE)
    # The targets' own distribution: zero mean, covariance X Xᵀ / δ + noise.
    marginal = torch.distributions.MultivariateNormal(
        torch.zeros(12, dtype=torch.float64), x @ x.mT / prior + noise * torch.eye(12, dtype=torch.float64)
    )
    evidence = log_marginal_likelihood(posterior, sum_log_likelihood(posterior, [(x[:5], y[:5]), (x[5:], y[5:])]))
    assert evidence == pytest.approx(float(marginal.log_prob(y[:, 0])), abs=1e-9)
    # And the predictive one.
    new = randn(4, 3, seed=9)
    predicted = add_noise(predict_linearised(posterior, new), likelihood)
    variance = (new @ torch.linalg.inv(precision) * new).sum(1) + noise
    torch.testing.assert_close(predicted.variance[:, 0], variance, **CLOSE)
    torch.testing.assert_close(predicted.mean, model(new).detach(), **CLOSE)


@pytest.mark.parametrize("name", NETWORKS)
def test_linearised_covariance_is_that_of_dense_matrices(name: str) -> None:
    posterior, x = _posterior(name)
    predicted = predict_linearised(posterior, x)
    jacobians = example_jacobians(posterior.model, x, posterior.curvature.selection.names)
    dense = jacobians @ posterior.covariance.to_dense() @ jacobians.mT
    torch.testing.assert_close(predicted.covariance, dense, **CLOSE)
    torch.testing.assert_close(predicted.mean, posterior.model(x).detach(), **CLOSE)


@pytest.mark.parametrize("name", ["mlp", "grouped cnn", "tokens"])
def test_samples_have_the_posteriors_mean_and_covariance(name: str) -> None:
    posterior, _ = _posterior(name)
    draws, generator = 20_000, torch.Generator().manual_seed(3)
    samples = posterior.sample(draws, generator=generator) - posterior.mean_P
    size = samples.shape[1]
    probes = randn(size, 8, seed=4) / math.sqrt(size)
    truth = (probes * (posterior.covariance @ probes)).sum(0)
    z = samples @ probes
    # Squares of normal variables have a relative standard error of √(2 / draws) = 1 %.
    assert ((z.square().mean(0) / truth - 1).abs() < 5 * math.sqrt(2 / draws)).all()
    assert (z.mean(0).abs() < 5 * (truth / draws).sqrt()).all()
    # The biased twin, under another prior, is told apart.
    twin = posterior.with_prior_precision(0.6)
    other = (probes * (twin.covariance @ probes)).sum(0)
    assert ((z.square().mean(0) / other - 1).abs() > 5 * math.sqrt(2 / draws)).any()


@pytest.mark.parametrize("per_layer", [False, True])
def test_the_tuned_prior_maximises_the_marginal_likelihood(per_layer: bool) -> None:
    posterior, _ = _posterior("mlp")
    tuned = tune_prior_precision(posterior, per_layer=per_layer)
    best = log_marginal_likelihood(tuned, 0.0)
    assert len(set(tuned.prior_precisions.values())) == (3 if per_layer else 1)
    for factor in (0.5, 0.99, 1.01, 2.0):
        for layer in tuned.prior_precisions:
            chosen = dict(tuned.prior_precisions)
            names = [layer] if per_layer else list(chosen)
            moved = tuned.with_prior_precision(chosen | {name: factor * chosen[name] for name in names})
            assert log_marginal_likelihood(moved, 0.0) < best
    # Effective parameters balance the weights' penalty, by finite differences of the evidence.
    step = 1e-4
    scaled = {
        sign: {name: value * math.exp(sign * step) for name, value in tuned.prior_precisions.items()}
        for sign in (-1, 1)
    }
    slope = sum(sign * log_marginal_likelihood(tuned.with_prior_precision(scaled[sign]), 0.0) for sign in (-1, 1))
    assert abs(slope / (2 * step)) < 1e-6


def test_predictions_and_samples_are_about_the_parameters_at_the_fit() -> None:
    posterior, x = _posterior("mlp")
    before = predict_linearised(posterior, x)
    with torch.no_grad():
        for tensor in posterior.model.parameters():
            tensor.mul_(2)
    trained_on = [tensor.detach().clone() for tensor in posterior.model.parameters()]
    after = predict_linearised(posterior, x)
    torch.testing.assert_close(after.mean, before.mean, rtol=0, atol=0)
    torch.testing.assert_close(after.covariance, before.covariance, rtol=0, atol=0)
    sample_outputs(posterior, x, 2)
    with pytest.raises(KeyError), posterior.parameters_at(posterior.mean_P):
        raise KeyError
    # What was trained since is still there.
    for tensor, expected in zip(posterior.model.parameters(), trained_on, strict=True):
        torch.testing.assert_close(tensor.detach(), expected, rtol=0, atol=0)


def test_sampled_networks_agree_with_the_linearisation_of_a_linear_network() -> None:
    model, x = double(nn.Sequential(nn.Linear(4, 3))), randn(3, 4)
    curvature = kfac(model, (randn(9, 4, seed=5), torch.zeros(9)), CategoricalOutputs())
    posterior = fit_laplace(model, curvature, CategoricalOutputs(), dataset_size=20, prior_precision=2.0)
    linear, draws = predict_linearised(posterior, x), 4000
    outputs = sample_outputs(posterior, x, draws, generator=torch.Generator().manual_seed(1))
    assert outputs.shape == (draws, 3, 3)
    error = (linear.variance / draws).sqrt()
    assert ((outputs.mean(0) - linear.mean).abs() < 5 * error).all()
    assert ((outputs.var(0) / linear.variance - 1).abs() < 5 * math.sqrt(2 / draws)).all()
    sampled = linear.sample(draws, generator=torch.Generator().manual_seed(2))
    assert ((sampled.mean(0) - linear.mean).abs() < 5 * error).all()
    covariances = torch.stack([torch.cov(sampled[:, example].mT) for example in range(3)])
    # A product of two normal variables spreads by at most √2 times the product of their standard deviations.
    scale = (linear.variance[:, :, None] * linear.variance[:, None, :]).sqrt()
    assert ((covariances - linear.covariance).abs() < 5 * scale * math.sqrt(2 / draws)).all()
    spread = outputs.softmax(-1).std(0) / math.sqrt(draws)
    gap = outputs.softmax(-1).mean(0) - linear.sampled_probabilities(draws, generator=torch.Generator().manual_seed(6))
    assert (gap.abs() < 5 * math.sqrt(2) * spread).all()


def test_probit_probabilities_are_close_to_two_class_integrals() -> None:
    # One logit against zero: E[sigmoid] by a fine sum.
    mean, variance = torch.tensor([[1.2, 0.0]], dtype=torch.float64), 4.0
    covariance = torch.diag(torch.tensor([variance, 0.0], dtype=torch.float64))[None]
    grid = torch.linspace(-40, 40, 20001, dtype=torch.float64)
    density = torch.exp(-0.5 * (grid - 1.2) ** 2 / variance) / math.sqrt(2 * math.pi * variance)
    integral = float((torch.sigmoid(grid) * density).sum() * (grid[1] - grid[0]))
    found = OutputDistribution(mean, covariance)
    sampled = found.sampled_probabilities(40_000, generator=torch.Generator().manual_seed(0))
    assert float(sampled[0, 0]) == pytest.approx(integral, abs=0.006)
    assert float(found.probit_probabilities()[0, 0]) == pytest.approx(integral, abs=0.02)


def test_bad_input_is_named() -> None:
    model, x, _ = build("mlp")
    curvature = kfac(model, (x, torch.zeros(4)), CategoricalOutputs())
    with pytest.raises(OperatorError, match="got a Tensor"):
        fit_laplace(model, curvature.to_dense(), CategoricalOutputs(), dataset_size=4)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="got 0"):
        fit_laplace(model, curvature, CategoricalOutputs(), dataset_size=0)
    with pytest.raises(BudgetError, match=r"layer '0' must be positive and finite, but got -1"):
        fit_laplace(model, curvature, CategoricalOutputs(), dataset_size=4, prior_precision=-1.0)
    with pytest.raises(UnknownNameError, match=r"'00'.*did you mean '0'"):
        fit_laplace(model, curvature, CategoricalOutputs(), dataset_size=4, prior_precision={"00": 1.0})
    with pytest.raises(UnknownNameError, match="lacks the layers '2', '4'"):
        fit_laplace(model, curvature, CategoricalOutputs(), dataset_size=4, prior_precision={"0": 1.0})
    with pytest.raises(UnknownNameError, match=r"does not have: 0\.weight, 0\.bias"):
        fit_laplace(nn.Linear(4, 3), curvature, CategoricalOutputs(), dataset_size=4)
    posterior = fit_laplace(model, curvature, CategoricalOutputs(), dataset_size=4)
    with pytest.raises(BudgetError, match="got 0"):
        posterior.sample(0)
    flat = fit_laplace(model, curvature.replace_eigenvalues(lambda _, v: 0 * v), CategoricalOutputs(), dataset_size=4)
    with pytest.raises(SingularCurvatureError, match=r"'0' has no maximum .* curvature sums to 0"):
        tune_prior_precision(flat, per_layer=True)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.zero_()
    empty = fit_laplace(model, curvature, CategoricalOutputs(), dataset_size=4)
    with pytest.raises(SingularCurvatureError, match=r"'all layers' has no maximum .* squared parameters to 0"):
        tune_prior_precision(empty)
    noisy = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.1)).double().eval()
    sharing = KroneckerOptions(sharing=WeightSharing.REDUCE)
    fitted = fit_laplace(
        noisy,
        kfac(noisy, (x, torch.zeros(4)), CategoricalOutputs(), options=sharing),
        CategoricalOutputs(),
        dataset_size=4,
    )
    noisy.train()
    for use in (lambda: sample_outputs(fitted, x, 1), lambda: predict_linearised(fitted, x)):
        with pytest.raises(StochasticModelError, match=r"'1' is a Dropout with p=0.1"):
            use()
