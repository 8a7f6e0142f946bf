"""A Gaussian around trained parameters whose precision is curvature plus prior."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import numbers
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn

from cheapgrad.curvature.kronecker.curvature import KroneckerCurvature
from cheapgrad.curvature.kronecker.outputs import AbstractOutputs
from cheapgrad.curvature.operators.batches import BatchReader
from cheapgrad.errors import (
    BudgetError,
    OperatorError,
    UnknownNameError,
    check_count,
    check_instance,
    check_number,
    nearest_match,
)


@final
@dataclass(frozen=True, eq=False)
class KroneckerLaplace:
    """The Laplace posterior ``N(θ*, (N·F + δ)⁻¹)`` over a curvature's parameters; build it with `fit_laplace`.

    Attributes:
        model: the network; its parameters are put back whenever a method has changed them.
        curvature: F, the mean curvature per example.
        likelihood: of the outputs.
        dataset_size: N, the examples that the posterior is conditioned on.
        prior_precisions: δ by layer name: the prior of a layer's parameters is ``N(0, I / δ)``.
        mean_P: θ*, the parameters when the posterior was built.
        reader: how inputs become outputs.
    """

    model: nn.Module
    curvature: KroneckerCurvature
    likelihood: AbstractOutputs
    dataset_size: float
    prior_precisions: Mapping[str, float]
    mean_P: Tensor
    reader: BatchReader = field(default_factory=BatchReader)

    @property
    def covariance(self) -> KroneckerCurvature:
        """The posterior covariance ``(N·F + δ)⁻¹``, as an operator."""
        return self.curvature.replace_eigenvalues(
            lambda name, values: 1 / (self.dataset_size * values + self.prior_precisions[name])
        )

    def with_prior_precision(self, prior_precision: float | Mapping[str, float]) -> KroneckerLaplace:
        """Return the posterior under another prior.

        Args:
            prior_precision: one positive number, or one by layer name for all layers.

        Raises:
            BudgetError: if one is not positive and finite.
            UnknownNameError: if a layer is missing or not known.
        """
        names = [block.layer.name for block in self.curvature.blocks]
        return dataclasses.replace(self, prior_precisions=_spread_prior(prior_precision, names))

    def sample(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Return parameters drawn from the posterior.

        Args:
            count: how many, at least 1.
            generator: source of the draws, on the parameters' device; torch's default without it.

        Returns:
            ``[count, P]``, in the curvature's order of parameters.

        Law:
            Independent, with mean θ* and covariance ``(N·F + δ)⁻¹`` exactly.

        Raises:
            BudgetError: if `count` is no whole number of at least 1.
        """
        check_count("count", count)
        mean = self.mean_P
        noise = torch.randn(count, len(mean), dtype=mean.dtype, device=mean.device, generator=generator)
        # Q diag(√variance) z has the covariance Q diag(variance) Qᵀ.
        spread = self.covariance.replace_eigenvalues(lambda _, values: values.sqrt())
        parts, blocks = spread.split(noise), {block.layer.name: block for block in spread.blocks}
        scaled = {
            name: blocks[name].basis.rotate_back(blocks[name].eigenvalues_QOI * part) for name, part in parts.items()
        }
        return mean + spread.join(scaled)

    @contextlib.contextmanager
    def parameters_at(self, vector_P: Tensor) -> Iterator[None]:
        """Give the model these parameters inside the context, and its own back afterwards, also after an exception."""
        selection = self.curvature.selection
        named = dict(self.model.named_parameters())
        before = {name: named[name].detach().clone() for name in selection.names}
        try:
            _write(named, selection.split(vector_P))
            yield
        finally:
            _write(named, before)


def fit_laplace(
    model: nn.Module,
    curvature: KroneckerCurvature,
    likelihood: AbstractOutputs,
    *,
    dataset_size: float,
    prior_precision: float | Mapping[str, float] = 1.0,
    reader: BatchReader | None = None,
) -> KroneckerLaplace:
    """Return the Laplace posterior around a model's present parameters.

    Args:
        model: trained, so that its parameters are near a maximum of the posterior density.
        curvature: of this model, from `kfac` or `ekfac`; a mean over examples, from any number of them.
        likelihood: the one that the curvature was made with.
        dataset_size: examples in the training set, which the curvature is multiplied by; not those of the batch.
        prior_precision: δ > 0, for all layers or by layer name; see `tune_prior_precision`.
        reader: how inputs become outputs.

    Returns:
        The posterior.

    Law:
        The variance along a direction of curvature λ is ``1 / (N λ + δ)``. With curvature of the batch that chose the
        directions λ is too large along the leading ones, hence the posterior too sure of them.

    Raises:
        OperatorError: if the curvature is not of this kind, or made of another model or likelihood.
        ArgumentError: if the model, the likelihood or the reader is none.
        BudgetError: if a number is not positive and finite.
        UnknownNameError: if a layer with a prior precision is missing or not known.

    Example:
        >>> from cheapgrad.curvature.kronecker import GaussianOutputs, kfac
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> batch = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.zeros(2, 1)
        >>> posterior = fit_laplace(layer, kfac(layer, batch, GaussianOutputs()), GaussianOutputs(), dataset_size=2)
        >>> posterior.covariance.to_dense()
        tensor([[0.5000, 0.0000],
                [0.0000, 0.1000]])

    References:
        MacKay (1992), A practical Bayesian framework for backpropagation networks; Ritter, Botev and Barber (2018), A
        scalable Laplace approximation for neural networks.
    """
    if not isinstance(curvature, KroneckerCurvature):
        raise OperatorError(
            f"a Laplace posterior needs a KroneckerCurvature, from kfac(...) or ekfac(...), but got a "
            f"{type(curvature).__name__}"
        )
    check_instance("model", model, nn.Module)
    check_instance("likelihood", likelihood, AbstractOutputs, "use the one that the curvature was made with")
    reader = BatchReader() if reader is None else reader
    check_instance("reader", reader, BatchReader, "use BatchReader(...)")
    dataset_size = check_number("dataset_size", dataset_size, above=0)
    named = dict(model.named_parameters())
    missing = [name for name in curvature.selection.names if name not in named]
    if missing:
        raise UnknownNameError(
            f"the curvature is about {len(missing)} parameters that the model does not have: {', '.join(missing)}"
            f"{nearest_match(missing[0], named)}"
        )
    _check_belongs(model, curvature, likelihood)
    mean_P = curvature.selection.flatten([named[name].detach() for name in curvature.selection.names]).clone()
    prior = _spread_prior(prior_precision, [block.layer.name for block in curvature.blocks])
    return KroneckerLaplace(model, curvature, likelihood, dataset_size, prior, mean_P, reader)


def _check_belongs(model: nn.Module, curvature: KroneckerCurvature, likelihood: AbstractOutputs) -> None:
    """Raise `OperatorError` if the curvature is another model's, or another likelihood's."""
    modules = dict(model.named_modules())
    strange = [
        block.layer.name for block in curvature.blocks if modules.get(block.layer.name) is not block.layer.module
    ]
    if strange:
        raise OperatorError(
            f"{len(strange)} of {len(curvature.blocks)} layers of the curvature, first {strange[0]!r}, are not those "
            f"of this {type(model).__name__}, only of the same name; make the curvature of the model itself, not of a "
            "copy"
        )
    own = curvature.likelihood
    # Likelihoods that are no dataclasses may not know when they are equal.
    is_same = type(own) is type(likelihood) and (not dataclasses.is_dataclass(own) or own == likelihood)
    if own is not None and not is_same:
        raise OperatorError(
            f"the curvature is that of {own!r}, but the likelihood given is {likelihood!r}; use the same"
        )


def _spread_prior(prior_precision: float | Mapping[str, float], names: list[str]) -> dict[str, float]:
    values = prior_precision if isinstance(prior_precision, Mapping) else dict.fromkeys(names, prior_precision)
    for name in values:
        if name not in names:
            raise UnknownNameError(f"no layer {name!r} is in the curvature{nearest_match(str(name), names)}")
    missing = [name for name in names if name not in values]
    if missing:
        raise UnknownNameError(
            f"prior_precision lacks the layers {', '.join(repr(name) for name in missing)}; give one number for all, "
            "or one for each layer"
        )
    for name, value in values.items():
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not (is_number and math.isfinite(value) and value > 0):
            raise BudgetError(
                f"the prior precision of layer {name!r} must be positive and finite, but got {value!r}; without a "
                "prior the posterior of directions without curvature is not defined"
            )
    return {name: float(values[name]) for name in names}


def _write(named: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            named[name].copy_(tensor)
