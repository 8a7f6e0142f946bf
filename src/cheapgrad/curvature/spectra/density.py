"""Spectral density by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.curvature.operators import AbstractOperator
from cheapgrad.curvature.spectra.estimates import ScalarEstimate, summarize_draws
from cheapgrad.curvature.spectra.probes import check_probes, draw_normals
from cheapgrad.errors import BudgetError, NonFiniteCurvatureError, ShapeError, check_count, describe_value

# A squared component of an eigenvector below this is rounding.
_NO_WEIGHT = 1e-28


@dataclass(frozen=True)
class SpectralDensity:
    """Quadratures of a spectrum, one for each probe: ``tr f(A) ≈ P Σ_j weight_j f(node_j)``.

    Attributes:
        nodes: ``[R, K]``, float64, one row a probe.
        weights: ``[R, K]``, of sum one in each row.
        dimension: P, the number of eigenvalues.
        products: matrix-vector products that were made.
    """

    nodes: Tensor
    weights: Tensor
    dimension: int
    products: int

    def integrate(self, function: Callable[[Tensor], Tensor]) -> ScalarEstimate:
        """Estimate ``tr f(A) = Σ_i f(λ_i)``, with the standard error over probes.

        Args:
            function: of a tensor of eigenvalues, entry by entry; it has to be defined between the ends of the spectrum.

        Law:
            Exact in expectation for polynomials of a degree below twice the steps; for others the error of the
            quadrature falls exponentially with the steps where the function is smooth on the spectrum.

        Raises:
            ShapeError: if the function does not return a tensor of the shape it was given.
            NonFiniteCurvatureError: if it is not finite at a node.
        """
        values_RK = function(self.nodes)
        if not isinstance(values_RK, Tensor) or values_RK.shape != self.nodes.shape:
            raise ShapeError(
                f"the function must return a value for each eigenvalue, shape {tuple(self.nodes.shape)}, but returned "
                f"{describe_value(values_RK)}"
            )
        # Nodes without weight only fill up the rows, and may lie where the function is not defined.
        terms_RK = torch.where(self.weights > _NO_WEIGHT, self.weights * values_RK, 0.0)
        if not torch.isfinite(terms_RK).all():
            node = float(self.nodes[~torch.isfinite(terms_RK)][0])
            raise NonFiniteCurvatureError(
                f"the function is not finite at {int((~torch.isfinite(terms_RK)).sum())} of {terms_RK.numel()} nodes, "
                f"first at {node:.6g}; it has to be defined from {float(self.nodes.min()):.6g} to "
                f"{float(self.nodes.max()):.6g}"
            )
        sums_R = terms_RK.sum(1)
        return summarize_draws(self.dimension * sums_R, self.products, "spectral_density")

    def evaluate(self, points: Tensor, *, width: float | None = None) -> tuple[Tensor, Tensor]:
        """Return the density at points ``[D]``, smoothed by a Gaussian, and its standard errors over probes.

        Args:
            points: where, ``[D]``.
            width: standard deviation of the Gaussian; a hundredth of the range of the nodes if it is not given.

        Returns:
            Density and standard errors, each ``[D]``; the density's integral is one.

        Raises:
            BudgetError: if the width is not positive.
        """
        chosen = float(self.nodes.max() - self.nodes.min()) / 100 if width is None else width
        if not chosen > 0:
            raise BudgetError(
                f"the width of the smoothing must be positive, but is {chosen!r}; give one, e.g. width=0.1"
            )
        scaled_DRK = (points.double()[:, None, None] - self.nodes) / chosen
        bumps_DRK = torch.exp(-scaled_DRK.square() / 2) / (chosen * math.sqrt(2 * math.pi))
        density_DR = (bumps_DRK * self.weights).sum(-1)
        return density_DR.mean(1), density_DR.std(1) / math.sqrt(density_DR.shape[1])

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "nodes": self.nodes.tolist(),
            "weights": self.weights.tolist(),
            "dimension": self.dimension,
            "products": self.products,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SpectralDensity:
        """Return what `to_dict` was made from."""
        tensors = {name: torch.tensor(data[name], dtype=torch.float64) for name in ("nodes", "weights")}
        return cls(**tensors, dimension=data["dimension"], products=data["products"])


def spectral_density(
    operator: Any, *, probes: int = 8, steps: int = 32, generator: torch.Generator | None = None
) -> SpectralDensity:
    """Estimate the density of all eigenvalues by Lanczos from random starts.

    Each start z gives a small tridiagonal matrix, whose eigenvalues and squared first components are the nodes and
    weights of a Gauss quadrature of the measure ``Σ_i (u_iᵀz)² δ(λ_i)``; over random z its mean is the density.

    Args:
        operator: anything with ``shape`` and ``@``, symmetric.
        probes: starts, at least 2. All are multiplied together, step by step.
        steps: of Lanczos, from 1 to the number of parameters, fully reorthogonalised.
        generator: of the starts; torch's default otherwise. Processes of a group need equal ones.

    Returns:
        The quadratures, to be integrated against functions or drawn.

    Law:
        ``tr f(A)`` is unbiased for polynomials f of a degree below ``2 steps``. Holds ``probes × steps`` vectors and
        makes as many products.

    Raises:
        BudgetError: if probes or steps are out of range.
        NonFiniteCurvatureError: if a product is not finite.

    Example:
        >>> from cheapgrad.curvature import DenseOperator
        >>> density = spectral_density(DenseOperator(2 * torch.eye(5, dtype=torch.float64)), probes=2, steps=3)
        >>> round(density.integrate(torch.exp).value, 6) == round(5 * 2.718281828**2, 6)
        True

    References:
        Ubaru, Chen, Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, SIMAX 2017.
    """
    operator = check_probes(operator, "probes", probes)
    check_count("steps", steps)
    steps = min(steps, operator.shape[0])
    starts_PR = draw_normals(operator, probes, generator)
    nodes, weights = [], []
    for tridiagonal_KK in _tridiagonalize(operator, starts_PR / starts_PR.norm(dim=0), steps):
        values_K, vectors_KK = torch.linalg.eigh(tridiagonal_KK)
        nodes.append(values_K)
        weights.append(vectors_KK[0].square())
    return SpectralDensity(torch.stack(nodes), torch.stack(weights), operator.shape[0], probes * steps)


def _tridiagonalize(operator: AbstractOperator, starts_PR: Tensor, steps: int) -> Tensor:
    """Return the tridiagonal matrices ``[R, K, K]`` of as many independent runs of Lanczos, in float64."""
    size, probes = starts_PR.shape
    basis_RKP = torch.zeros(probes, steps, size).to(starts_PR)
    small_RKK = torch.zeros(probes, steps, steps, dtype=torch.float64)
    current_RP = starts_PR.T.contiguous()
    eps = torch.finfo(starts_PR.dtype).eps
    for step in range(steps):
        basis_RKP[:, step] = current_RP
        image_RP = (operator @ current_RP.T).T
        norm_R = image_RP.norm(dim=1)
        small_RKK[:, step, step] = (image_RP * current_RP).sum(1).double().cpu()
        known_RKP = basis_RKP[:, : step + 1]
        for _ in range(2):
            along_RK = torch.einsum("rkp,rp->rk", known_RKP, image_RP)
            image_RP = image_RP - torch.einsum("rkp,rk->rp", known_RKP, along_RK)
        if step + 1 == steps:
            break
        length_R = image_RP.norm(dim=1)
        # A start that spans an invariant space ends here: what follows has weight zero.
        length_R = torch.where(length_R > 10 * eps * size**0.5 * norm_R, length_R, torch.zeros_like(length_R))
        small_RKK[:, step, step + 1] = small_RKK[:, step + 1, step] = length_R.double().cpu()
        current_RP = torch.where(length_R[:, None] > 0, image_RP / length_R.clamp(min=1e-30)[:, None], 0)
    return small_RKK
