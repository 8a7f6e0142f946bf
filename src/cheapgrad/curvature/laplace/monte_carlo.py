"""Predictions of networks whose parameters are drawn from the posterior."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cheapgrad.curvature.laplace.posterior import KroneckerLaplace
from cheapgrad.curvature.operators.execution import check_deterministic, explain_failure


def sample_outputs(
    posterior: KroneckerLaplace, inputs: Any, count: int, *, generator: torch.Generator | None = None
) -> Tensor:
    """Return the outputs of `count` networks drawn from the posterior, ``[count, B, ..., C]``.

    Class probabilities are ``sample_outputs(...).softmax(-1).mean(0)``.

    Args:
        posterior: gives the parameters' distribution and the model, which has to be in ``eval()``.
        inputs: what the model is run on, on its device.
        count: how many networks, at least 1; one forward pass each.
        generator: source of the draws; torch's default without it.

    Law:
        Unbiased for the expectation of any function of the outputs under the posterior. For deep networks that
        expectation itself is often poor, since the curvature is that of the linearised network; prefer
        `predict_linearised`. The model's parameters are put back, also after an exception.

    Raises:
        BudgetError: if `count` is no whole number of at least 1.
        StochasticModelError: for dropout or batch norm in training mode.
        ForwardError: if the model raises.
    """
    check_deterministic(posterior.model)
    outputs, what = [], f"the forward pass of a {type(posterior.model).__name__}"
    with torch.no_grad():
        for vector_P in posterior.sample(count, generator=generator):
            with posterior.parameters_at(vector_P), explain_failure(what, inputs=inputs):
                outputs.append(posterior.reader.run(posterior.model, inputs))
    return torch.stack(outputs)
