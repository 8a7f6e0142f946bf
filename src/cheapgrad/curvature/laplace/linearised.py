"""Predictions of the network linearised in its parameters: a Gaussian over outputs, without sampling parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from cheapgrad.curvature.kronecker.outputs import GaussianOutputs
from cheapgrad.curvature.kronecker.problem import KroneckerOptions, Problem
from cheapgrad.curvature.kronecker.tape import Tape, measuring, record
from cheapgrad.curvature.laplace.posterior import KroneckerLaplace
from cheapgrad.curvature.operators.batches import Batch, move_to
from cheapgrad.errors import check_count, check_instance


@final
@dataclass(frozen=True)
class OutputDistribution:
    """A Gaussian over the outputs of every example.

    Attributes:
        mean: outputs at θ*, ``[B, ..., C]``.
        covariance: of an example's flattened outputs, ``[B, outputs, outputs]``.
    """

    mean: Tensor
    covariance: Tensor

    @property
    def variance(self) -> Tensor:
        """The variance of every output, like `mean`."""
        return self.covariance.diagonal(dim1=1, dim2=2).reshape(self.mean.shape)

    def probit_probabilities(self) -> Tensor:
        """Return class probabilities ``softmax(mean / √(1 + π/8 · variance))``, like `mean`.

        Law:
            An approximation, without sampling and blind to covariances between classes.

        References:
            MacKay (1992), The evidence framework applied to classification networks, for two classes.
        """
        return (self.mean / torch.sqrt(1 + math.pi / 8 * self.variance)).softmax(-1)

    def sample(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Return outputs drawn from the Gaussian, ``[count, B, ..., C]``.

        Raises:
            BudgetError: if `count` is no whole number of at least 1.
        """
        check_count("count", count)
        # Covariances of rank below C have no Cholesky factor.
        values, vectors = torch.linalg.eigh(self.covariance)
        roots = vectors * values.clamp_min(0).sqrt()[:, None, :]
        shape = (*self.covariance.shape[:2], count)
        noise = torch.randn(shape, dtype=self.mean.dtype, device=self.mean.device, generator=generator)
        return self.mean + (roots @ noise).movedim(-1, 0).reshape(count, *self.mean.shape)

    def sampled_probabilities(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Return class probabilities as the mean softmax over sampled outputs, like `mean`.

        Law:
            Unbiased for the expected softmax under this Gaussian; the standard error falls as ``1/√count``.
        """
        return self.sample(count, generator=generator).softmax(-1).mean(0)


def predict_linearised(posterior: KroneckerLaplace, inputs: Any) -> OutputDistribution:
    """Return the Gaussian over outputs of ``f(x, θ*) + J (θ − θ*)``: mean ``f(x, θ*)``, covariance ``J Σ Jᵀ``.

    Args:
        posterior: gives θ*, Σ and the model, which has to be in ``eval()``.
        inputs: what the model is run on: a tensor, a dict or a tuple.

    Returns:
        Mean and covariance of the outputs, without the noise of the likelihood.

    Law:
        Exact for networks that are linear in the chosen parameters. One forward pass, and one backward pass per output
        of an example; memory is that of C cotangents of every layer, so large data go in parts.

    Raises:
        StochasticModelError: for dropout or batch norm in training mode.
        BatchError: if there is no example.
        ForwardError: if the model raises.

    References:
        Khan et al. (2019), Approximate inference turns deep networks into Gaussian processes; Immer, Korzepa and Bauer
        (2021), Improving predictions of Bayesian neural nets via local linearization.
    """
    curvature = posterior.curvature
    layers = tuple(block.layer for block in curvature.blocks)
    options = KroneckerOptions(reader=posterior.reader)
    problem = Problem(posterior.model, posterior.likelihood, options, curvature.selection, layers)
    batch = Batch(move_to(inputs, curvature.device), None, 1.0, 0)
    with measuring(problem), posterior.parameters_at(posterior.mean_P):
        tape = record(problem, batch)
        covariance = _propagate(posterior, tape)
    return OutputDistribution(tape.outputs, covariance)


def add_noise(distribution: OutputDistribution, likelihood: GaussianOutputs) -> OutputDistribution:
    """Return the distribution of targets: that of outputs, with the likelihood's noise.

    Args:
        distribution: of outputs.
        likelihood: gives the variance of the noise.

    Law:
        Noise is independent of the parameters, so that the variances add.

    Raises:
        ArgumentError: if the likelihood is another one.
    """
    check_instance("likelihood", likelihood, GaussianOutputs, "classes have no noise to add to their logits")
    size = distribution.covariance.shape[-1]
    noise = likelihood.variance * torch.eye(size, dtype=distribution.mean.dtype, device=distribution.mean.device)
    return OutputDistribution(distribution.mean, distribution.covariance + noise)


def _propagate(posterior: KroneckerLaplace, tape: Tape) -> Tensor:
    """Return ``J Σ Jᵀ`` for every example, ``[B, outputs, outputs]``."""
    size = tape.outputs[0].numel()
    basis = {block.layer.name: block.basis for block in posterior.curvature.blocks}
    columns: dict[str, list[Tensor]] = {name: [] for name in basis}
    for output in range(size):
        cotangent = torch.zeros_like(tape.outputs).flatten(1)
        cotangent[:, output] = 1
        for name, rows_QBTO in tape.pull_back(cotangent.reshape(tape.outputs.shape)).items():
            columns[name].append(rows_QBTO @ basis[name].outputs_QOO[:, None])
    total = tape.outputs.new_zeros(len(tape.outputs), size, size)
    for name, variances_QOI in posterior.covariance.eigenvalues.items():
        rows = tape.rows[name].rotate(basis[name].inputs_QII)
        total += rows.weigh_gradients(torch.stack(columns.pop(name)), variances_QOI)
    return total
