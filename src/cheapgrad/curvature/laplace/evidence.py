"""The marginal likelihood of the Laplace posterior, and the prior precision that maximises it."""

from __future__ import annotations

import math
from typing import Any

import torch

from cheapgrad.curvature.laplace.posterior import KroneckerLaplace
from cheapgrad.curvature.operators.batches import Batches
from cheapgrad.curvature.operators.execution import check_deterministic, differentiable_mode, explain_failure
from cheapgrad.errors import SingularCurvatureError, check_number

# Prior precisions outside of this range are those of a problem without data or without parameters.
_LOG_RANGE = (math.log(1e-12), math.log(1e15))


def sum_log_likelihood(posterior: KroneckerLaplace, batches: Any) -> float:
    """Return ``Σ log p(target | input, θ*)`` over batches ``(inputs, targets)``.

    Args:
        posterior: gives model, parameters and likelihood.
        batches: all training data, for the marginal likelihood.

    Law:
        The sum over examples, without the prior; batches may have any sizes.

    Raises:
        LossError: if outputs and targets do not fit.
        TargetError: if targets that should be classes are none.
        ForwardError: if the model raises; the message names the batch.
    """
    check_deterministic(posterior.model)
    device = posterior.curvature.device
    total = 0.0
    with differentiable_mode(posterior.model, device), torch.no_grad(), posterior.parameters_at(posterior.mean_P):
        for batch in Batches(batches, posterior.reader, device):
            with explain_failure(f"the log-likelihood of batch {batch.index}", inputs=batch.inputs):
                outputs = posterior.reader.run(posterior.model, batch.inputs)
                total += float(posterior.likelihood.log_likelihood(outputs, batch.targets).double().sum())
    return total


def log_marginal_likelihood(posterior: KroneckerLaplace, log_likelihood: float) -> float:
    """Return Laplace's estimate of ``log p(targets | inputs, δ)``.

    ``log p(D | θ*) − ½ Σ_layers (δ ‖θ*‖² − P log δ + log det(N·F + δ))``

    Args:
        posterior: it.
        log_likelihood: of all N training examples at the mode: `sum_log_likelihood`.

    Law:
        Exact where the log-likelihood is quadratic in the chosen parameters, θ* the posterior's mode and the curvature
        exact, as in linear regression. Comparable between posteriors with the same parameters and data only.

    Raises:
        BudgetError: if the log-likelihood is no finite number.
    """
    check_number("log_likelihood", log_likelihood)
    precision = posterior.curvature.replace_eigenvalues(
        lambda name, values: (posterior.dataset_size * values + posterior.prior_precisions[name]).double()
    )
    penalty = float(precision.log_determinant())
    for name, block in posterior.curvature.split(posterior.mean_P).items():
        delta = posterior.prior_precisions[name]
        penalty += delta * float(block.double().square().sum()) - block.numel() * math.log(delta)
    return log_likelihood - 0.5 * penalty


def tune_prior_precision(posterior: KroneckerLaplace, *, per_layer: bool = False) -> KroneckerLaplace:
    """Return the posterior under the prior precision of the highest marginal likelihood, at fixed θ* and curvature.

    The maximum is where the effective number of parameters ``γ(δ) = Σ N λ / (N λ + δ)`` equals ``δ ‖θ*‖²``; the
    difference falls in δ, so there is one, and bisection finds it.

    Args:
        posterior: its prior is replaced.
        per_layer: whether every layer has its own δ.

    Law:
        ``log_marginal_likelihood`` is not higher at any other δ (of a layer, or of all).

    Raises:
        SingularCurvatureError: where there is no maximum: no curvature, or parameters that are all zero.

    References:
        MacKay (1992), Bayesian interpolation, equation for the effective number of parameters.
    """
    squares = {
        name: float(block.double().square().sum())
        for name, block in posterior.curvature.split(posterior.mean_P).items()
    }
    curved = {
        name: posterior.dataset_size * values.double() for name, values in posterior.curvature.eigenvalues.items()
    }
    if per_layer:
        return posterior.with_prior_precision({name: _balance([curved[name]], squares[name], name) for name in curved})
    return posterior.with_prior_precision(_balance(list(curved.values()), sum(squares.values()), "all layers"))


def _balance(curved: list[torch.Tensor], squares: float, name: str) -> float:
    """Return δ with ``Σ c / (c + δ) = δ · squares``."""
    everything = torch.cat([values.flatten() for values in curved])

    def excess(log_delta: float) -> float:
        delta = math.exp(log_delta)
        return float((everything / (everything + delta)).sum()) - delta * squares

    low, high = _LOG_RANGE
    if excess(low) <= 0 or excess(high) >= 0:
        raise SingularCurvatureError(
            f"the marginal likelihood of {name!r} has no maximum in its prior precision: its curvature sums to "
            f"{float(everything.sum()):.3g} and its squared parameters to {squares:.3g}; set the prior precision "
            "yourself"
        )
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return math.exp((low + high) / 2)
