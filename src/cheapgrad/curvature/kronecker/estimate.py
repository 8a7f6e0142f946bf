"""K-FAC and EKFAC, with basis and eigenvalues from one batch or from two."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cheapgrad.curvature.independence import count_shared
from cheapgrad.curvature.kronecker.curvature import KroneckerBlock, KroneckerCurvature
from cheapgrad.curvature.kronecker.eigenvalues import measure_eigenvalues
from cheapgrad.curvature.kronecker.factors import BasisPair, measure_factors
from cheapgrad.curvature.kronecker.outputs import AbstractOutputs
from cheapgrad.curvature.kronecker.problem import KroneckerOptions, Problem, pose_problem
from cheapgrad.curvature.operators.batches import Batches
from cheapgrad.errors import OverlapError


def kfac(
    model: nn.Module,
    batches: Any,
    likelihood: AbstractOutputs,
    *,
    eigenvalue_batches: Any = None,
    options: KroneckerOptions | None = None,
) -> KroneckerCurvature:
    """Return K-FAC: per layer ``A ⊗ G``, from the second moments A of activations and G of cotangents.

    With `eigenvalue_batches` the eigenvectors of A and G are those of `batches`, and the eigenvalues along them are
    read off the second batch's factors: ``diag(Q_AᵀA′Q_A) ⊗ diag(Q_GᵀG′Q_G)``.

    Args:
        model: with a first axis of examples in every layer; in ``eval()``.
        batches: a pair ``(inputs, targets)``, a dict, or an iterable of those. Only the empirical Fisher needs
            the targets; elsewhere zeros ``[B]`` may stand for them, and all others have to fit the likelihood.
        likelihood: of the outputs ``[B, ..., C]``; the loss is its negative logarithm, averaged over examples and
            summed over the positions of an example.
        eigenvalue_batches: other examples for the eigenvalues; the same without it, or if it is `batches` itself.
        options: Fisher, weight sharing, parameters, reader.

    Returns:
        The curvature, an operator over the chosen parameters.

    Law:
        Exact for the parameters of deep linear networks under `GaussianOutputs`, and of norms in any network. Elsewhere
        an approximation, in which activations and cotangents are taken to be independent. Same-batch eigenvalues are
        too large at the top and too small at the bottom; those of a second, independent batch are products of two
        quadratic forms, each with the full data's as its mean. One forward pass and C backward passes per batch; the
        eigendecomposition costs ``O(I³ + O³)`` per layer.

    Raises:
        UnsupportedModelError: listing layers without factors.
        StochasticModelError: for dropout or batch norm in training mode.
        LossError: if outputs or targets do not fit the likelihood.
        TargetError: if targets that should be classes are none.
        ForwardError: if the model raises; the message names the batch.
        OverlapError: if the second batches share memory with the first, such as overlapping slices. Copies of the same
            examples cannot be seen: `check_disjoint`.
        NonFiniteCurvatureError: for outputs or factors that are not finite.

    Example:
        >>> import torch
        >>> from cheapgrad.curvature.kronecker import GaussianOutputs
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> batch = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.zeros(2, 1)
        >>> kfac(layer, batch, GaussianOutputs()).to_dense()
        tensor([[0.5000, 0.0000],
                [0.0000, 4.5000]])

    References:
        Martens and Grosse (2015), Optimizing neural networks with Kronecker-factored approximate curvature; Grosse and
        Martens (2016) for convolutions. Two batches: Debiasing mini-batch quadratics (arXiv:2410.14325) describes
        the idea; which variant is used there is not known to us.
    """
    problem = pose_problem(model, likelihood, options)
    _check_apart(problem, batches, eigenvalue_batches)
    factors = measure_factors(problem, batches)
    basis = factors.find_basis()
    if eigenvalue_batches is not None:
        factors = measure_factors(problem, eigenvalue_batches)
    values = {name: pair.read_eigenvalues(factors.pairs[name]) for name, pair in basis.items()}
    return _assemble(problem, basis, values, factors.example_count)


def ekfac(
    model: nn.Module,
    batches: Any,
    likelihood: AbstractOutputs,
    *,
    eigenvalue_batches: Any = None,
    options: KroneckerOptions | None = None,
) -> KroneckerCurvature:
    """Return eigenvalue-corrected K-FAC: K-FAC's directions, and the layer's own curvature along each of them.

    ``λ_oi = mean over examples of Σ_columns ((Q_Gᵀ gradient Q_A)_oi)²``, on `eigenvalue_batches` if they are given.

    Args:
        model: as for `kfac`.
        batches: for the directions.
        likelihood: of the outputs.
        eigenvalue_batches: other examples for the eigenvalues; the same without it, or if it is `batches` itself.
        options: Fisher, weight sharing, parameters, reader.

    Returns:
        The curvature, an operator over the chosen parameters.

    Law:
        Every eigenvalue is the quadratic form of the eigenvalue batch's layer block along its direction, so the trace
        is that of the block. On an independent batch their mean is the full data's quadratic form along the same
        direction, whatever batch chose it; on the same batch they are too large at the top. Costs a forward pass and C
        backward passes for each of the two stages.

    Raises:
        UnsupportedModelError: listing layers without factors.
        StochasticModelError: for dropout or batch norm in training mode.
        OverlapError: if the second batches share memory with the first, as for `kfac`.
        NonFiniteCurvatureError: for outputs, factors or eigenvalues that are not finite.

    Example:
        >>> import torch
        >>> from cheapgrad.curvature.kronecker import GaussianOutputs
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> first = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.zeros(2, 1)
        >>> second = torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.zeros(2, 1)
        >>> ekfac(layer, first, GaussianOutputs(), eigenvalue_batches=second).trace()
        tensor(2.)

    References:
        George et al. (2018), Fast approximate natural gradient descent in a Kronecker-factored eigenbasis.
    """
    problem = pose_problem(model, likelihood, options)
    _check_apart(problem, batches, eigenvalue_batches)
    basis = measure_factors(problem, batches).find_basis()
    values, examples = measure_eigenvalues(
        problem, batches if eigenvalue_batches is None else eigenvalue_batches, basis
    )
    return _assemble(problem, basis, values, examples)


def along_basis_of(
    curvature: KroneckerCurvature,
    model: nn.Module,
    batches: Any,
    likelihood: AbstractOutputs,
    *,
    options: KroneckerOptions | None = None,
) -> KroneckerCurvature:
    """Return the corrected eigenvalues of other batches along the basis of a curvature that is already there.

    Args:
        curvature: gives the basis.
        model: as for `ekfac`.
        batches: for the eigenvalues.
        likelihood: of the outputs.
        options: those with which the basis was made.

    Returns:
        The curvature with its eigenvalues replaced.

    Law:
        The eigenvalues are the batches' own quadratic forms along the basis, as in `ekfac`. Which examples gave the
        basis is not known here: whether the batches are others is the caller's to see to. One forward pass and C
        backward passes per batch.

    Raises:
        UnsupportedModelError: listing layers without factors.
        StochasticModelError: for dropout or batch norm in training mode.
        NonFiniteCurvatureError: for outputs or eigenvalues that are not finite.
    """
    problem = pose_problem(model, likelihood, options)
    basis = {block.layer.name: block.basis for block in curvature.blocks}
    values, examples = measure_eigenvalues(problem, batches, basis)
    return _assemble(problem, basis, values, examples)


def _check_apart(problem: Problem, batches: Any, eigenvalue_batches: Any) -> None:
    """Raise `OverlapError` if the two share examples in memory; one object given twice is the same batch on purpose."""
    if eigenvalue_batches is None or eigenvalue_batches is batches:
        return
    first, second = (
        Batches(each, problem.options.reader, problem.selection.device).held_inputs()
        for each in (batches, eigenvalue_batches)
    )
    shared = count_shared(first, second)
    if shared:
        raise OverlapError(
            f"{shared} of {len(second)} eigenvalue batches share examples with those of the basis, so their "
            "eigenvalues are not free of its bias; pass other examples, or the same object for the same batch"
        )


def _assemble(
    problem: Problem, basis: dict[str, BasisPair], values: dict[str, Tensor], examples: float
) -> KroneckerCurvature:
    blocks = tuple(KroneckerBlock(layer, basis[layer.name], values[layer.name]) for layer in problem.layers)
    return KroneckerCurvature(blocks, problem.selection, examples, problem.likelihood)
