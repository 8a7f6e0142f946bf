"""Variance and bias of every method's gradient, at fixed weights and on a fixed batch."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cheapgrad.auditing import GradientMoments, measure_gradient_moments
from cheapgrad.demo.methods import Method
from cheapgrad.demo.setups import Setup
from cheapgrad.demo.training import compute_loss

_AUDIT_SEED = 2000
_DRAWS_OF_EXACT = 8


@dataclass(frozen=True)
class Noise:
    """What is known of one method's gradient.

    Attributes:
        predicted: relative variance by the laws, or None.
        fraction: added variance divided by that of the mini-batch gradient; for another batch size, by its law.
        moments: what was measured, or None for a batch as large as the usual one or larger, which adds no variance.
        tensor_fractions: added variance of each parameter's gradient divided by that of the mini-batch gradient, None
            where that is zero; empty without moments.
    """

    predicted: float | None
    fraction: float
    moments: GradientMoments | None
    tensor_fractions: tuple[float | None, ...] = ()


class NoiseMeter:
    """Measures gradients of a trained network on one batch.

    Args:
        setup: the network and how it is trained.
        model: the network with the weights to measure at; copied.
        pictures: the batch.
        classes: their classes.
    """

    def __init__(self, setup: Setup, model: nn.Module, pictures: Tensor, classes: Tensor) -> None:
        self._setup = setup
        self._model = copy.deepcopy(model).train()
        self._pictures, self._classes = pictures, classes
        self.exact_gradient = _gradient(self._model, pictures, classes)
        self.squared_norm = float(sum(tensor.double().square().sum() for tensor in self.exact_gradient))
        self.example_variances = self._measure_example_variances()
        self.example_variance = math.fsum(self.example_variances)

    def _measure_example_variances(self) -> list[float]:
        """Return ``Σ_b ‖g_b − g‖² / (B − 1)``, the variance of a single example's gradient, for each parameter."""
        totals = torch.zeros(len(self.exact_gradient), dtype=torch.float64)
        for position in range(len(self._classes)):
            one = slice(position, position + 1)
            gradient = _gradient(self._model, self._pictures[one], self._classes[one])
            totals += torch.stack(
                [
                    (single - mean).double().square().sum()
                    for single, mean in zip(gradient, self.exact_gradient, strict=True)
                ]
            )
        return (totals / (len(self._classes) - 1)).tolist()

    def measure(self, method: Method, draws: int) -> Noise:
        """Return predicted and measured noise of a method.

        Args:
            method: how the gradient is computed.
            draws: how many gradients to draw.
        """
        examples, usual = len(self._classes), self._setup.batch_size
        batch_size = method.batch_size or usual
        # The share of the usual batch decides, because the fixed batch may be smaller than the usual one.
        kept = round(examples * batch_size / usual)
        if method.kind == "batch" and kept >= examples:
            return Noise(predicted=None, fraction=usual / batch_size - 1, moments=None)
        model = copy.deepcopy(self._model)
        handle = method.convert(model)
        predicted = self._predict_batch(kept)
        if handle is not None:
            records = handle.predict(lambda: compute_loss(model, self._pictures, self._classes))
            predicted = self._predict_layers([row.weight_variance for row in records if row.status == "converted"])
        torch.manual_seed(_AUDIT_SEED)

        def draw_gradient() -> list[Tensor]:
            chosen = torch.randperm(examples)[:kept] if kept < examples else slice(None)
            return _gradient(model, self._pictures[chosen], self._classes[chosen])

        moments = measure_gradient_moments(
            draw_gradient,
            self.exact_gradient,
            # The exact gradient is the same in every draw; a few show that.
            draws=min(draws, _DRAWS_OF_EXACT) if method.kind in {"exact", "checkpoint"} else draws,
            names=[name for name, _ in model.named_parameters()],
        )
        added_variance = moments.relative_variance * self.squared_norm
        fraction = added_variance / (self.example_variance / examples)
        return Noise(
            predicted,
            fraction if method.kind == "strategy" else usual / batch_size - 1,
            moments,
            tuple(
                tensor.relative_variance * tensor.squared_norm / (variance / examples) if variance else None
                for tensor, variance in zip(moments.tensors, self.example_variances, strict=True)
            ),
        )

    def _predict_batch(self, kept: int) -> float:
        """Return the law of sampling without replacement; zero for the whole batch."""
        return (1 / kept - 1 / len(self._classes)) * self.example_variance / self.squared_norm

    def _predict_layers(self, variances: list[float | None]) -> float | None:
        known = [variance for variance in variances if variance is not None]
        return math.fsum(known) / self.squared_norm if len(known) == len(variances) else None


def _gradient(model: nn.Module, pictures: Tensor, classes: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(compute_loss(model, pictures, classes), list(model.parameters())))
