"""Laplace posteriors from mini-batch Kronecker factors on digits: same-batch against debiased, on held-out data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.pictures import load_patches
from cheapgrad.curvature.finite_population import FinitePopulation
from cheapgrad.curvature.kronecker import CategoricalOutputs, KroneckerCurvature, along_basis_of, ekfac, kfac
from cheapgrad.curvature.laplace import (
    KroneckerLaplace,
    expected_calibration_error,
    fit_laplace,
    negative_log_likelihood,
    predict_linearised,
    tune_prior_precision,
)

TRAINING, VALIDATION = 200, 300
BATCHES = (20, 64)
DRAWS = 100  # of outputs per prediction
BATCH_DRAWS = 16  # of batch pairs for the curvature ratio, per seed
LEADING = 20
EPOCHS = 300
# Pixels are standardised; noise of this standard deviation makes pictures that no training example looks like.
SHIFTS = {"test": 0.0, "noisy test": 1.0}

Pair = tuple[Tensor, Tensor]
Values = dict[str, float]
Key = tuple[int | None, str, str, str | None]
Estimates = dict[str, tuple[KroneckerCurvature, KroneckerCurvature]]


@dataclass(frozen=True)
class Split:
    """One seed's data and network.

    Attributes:
        model: trained on `training` alone, until it is far too sure of itself.
        training: inputs and classes.
        validation: inputs and classes for choosing a prior precision.
        tests: held-out inputs and classes by name.
    """

    model: nn.Module
    training: Pair
    validation: Pair
    tests: dict[str, Pair]


def measure_laplace(*, seeds: int) -> Iterator[dict[str, Any]]:
    """Yield records: means over seeds with standard errors, of calibration and of the curvature ratio.

    Methods that are compared see the same two batches; ``double`` is one batch of both, at the same budget. All of them
    are scaled to the whole training set, and each has the prior precision that is best for it: by its own marginal
    likelihood, or by the negative log-likelihood of the validation set. ``minus_same`` and ``minus_double`` are paired
    differences of the negative log-likelihood.
    """
    found: dict[Key, list[Values]] = {}
    ratios: dict[tuple[int | None, str], list[float]] = {}
    for seed in track(range(seeds), "laplace"):
        torch.manual_seed(seed)
        split = _train()
        for size in BATCHES:
            for method, ratio in _measure_ratios(split, size).items():
                ratios.setdefault((size, method), []).append(ratio)
        for key, values in _measure_calibration(split):
            found.setdefault(key, []).append(values)
    # Mini-batches first: they have all columns.
    for key in sorted(found, key=lambda key: key[0] is None):
        size, method, data, prior = key
        record: dict[str, Any] = {"benchmark": "laplace", "method": method, "batch": size, "data": data, "prior": prior}
        columns = {name: [values[name] for values in found[key]] for name in found[key][0]}
        if (size, method) in ratios:
            columns["curvature_ratio"] = ratios[size, method]
        family, _, way = method.partition(", ")
        for other in ("same batch", "double batch"):
            base = found.get((size, f"{family}, {other}", data, prior))
            if base and way != other:
                own = found[key]
                pairs = zip(own, base, strict=True)
                gaps = [a["negative_log_likelihood"] - b["negative_log_likelihood"] for a, b in pairs]
                columns[f"minus_{other.split()[0]}"] = gaps
        yield record | _summarise(columns)


def _summarise(columns: dict[str, list[float]]) -> Values:
    """Return mean and standard error over seeds."""
    found = {}
    for name, values in columns.items():
        found[name] = statistics.fmean(values)
        if len(values) > 1 and name not in {"accuracy", "prior_precision"}:
            found[f"{name}_error"] = statistics.stdev(values) / math.sqrt(len(values))
    return found


def _train() -> Split:
    patches = load_patches(None)
    order = torch.randperm(len(patches.labels))
    inputs, classes = patches.inputs.flatten(1)[order], patches.labels[order]
    parts = [inputs.split([TRAINING, VALIDATION, len(inputs) - TRAINING - VALIDATION])]
    parts += [classes.split([TRAINING, VALIDATION, len(inputs) - TRAINING - VALIDATION])]
    training, validation, (pictures, labels) = zip(*parts, strict=True)
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(EPOCHS):
        for index in torch.randperm(TRAINING).split(50):
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(model(training[0][index]), training[1][index]).backward()
            optimizer.step()
    tests = {name: (pictures + spread * torch.randn_like(pictures), labels) for name, spread in SHIFTS.items()}
    return Split(model.eval(), training, validation, tests)


def _estimate(split: Split, size: int) -> Estimates:
    """Return curvature from two disjoint batches of a size, in all ways, each with that of the batch of its basis."""
    order = torch.randperm(TRAINING)
    first, second, both = (
        (split.training[0][index], split.training[1][index])
        for index in (order[:size], order[size : 2 * size], order[: 2 * size])
    )
    model, classes = split.model, CategoricalOutputs()
    found: Estimates = {}
    for name, build in {"K-FAC": kfac, "EKFAC": ekfac}.items():
        same, double = build(model, first, classes), build(model, both, classes)
        held_out = build(model, first, classes, eigenvalue_batches=second)
        found[f"{name}, two batches"] = (held_out, same)
        found |= {f"{name}, same batch": (same, same), f"{name}, double batch": (double, double)}
        if name == "EKFAC":
            corrected = held_out.correct_for_population(same, FinitePopulation(TRAINING, size, size))
            found["EKFAC, two batches, population"] = (corrected, same)
    return found


def _measure_ratios(split: Split, size: int) -> dict[str, float]:
    """Return claimed over true curvature along the directions that lead on the basis's batch, sums over draws.

    True is the mean over all training data of the network's own curvature along the same directions.
    """
    claimed: dict[str, float] = {}
    true: dict[str, float] = {}
    for _ in range(BATCH_DRAWS):
        truths: dict[int, Tensor] = {}
        for method, (curvature, chosen_by) in _estimate(split, size).items():
            if id(chosen_by) not in truths:
                everything = along_basis_of(chosen_by, split.model, split.training, CategoricalOutputs())
                truths[id(chosen_by)] = _flatten(everything)
            leading = _flatten(chosen_by).topk(LEADING).indices
            claimed[method] = claimed.get(method, 0) + float(_flatten(curvature)[leading].sum())
            true[method] = true.get(method, 0) + float(truths[id(chosen_by)][leading].sum())
    return {method: claimed[method] / true[method] for method in claimed}


def _flatten(curvature: KroneckerCurvature) -> Tensor:
    return torch.cat([values.flatten() for values in curvature.eigenvalues.values()])


def _measure_calibration(split: Split) -> Iterator[tuple[Key, Values]]:
    """Yield what a record is about, and its measures."""
    with torch.no_grad():
        for name, (inputs, classes) in split.tests.items():
            yield (None, "mode, no posterior", name, None), _measure(split.model(inputs).softmax(1), classes)
    chosen: list[tuple[int | None, str, KroneckerCurvature]] = [
        (None, f"{name}, all data", build(split.model, split.training, CategoricalOutputs()))
        for name, build in {"K-FAC": kfac, "EKFAC": ekfac}.items()
    ]
    for size in BATCHES:
        chosen += [(size, method, curvature) for method, (curvature, _) in _estimate(split, size).items()]
    for size, method, curvature in chosen:
        fitted = fit_laplace(split.model, curvature, CategoricalOutputs(), dataset_size=TRAINING)
        for prior, posterior in {
            "evidence": tune_prior_precision(fitted),
            "validation": _validate(fitted, split),
        }.items():
            precision = {"prior_precision": next(iter(posterior.prior_precisions.values()))}
            for name, (inputs, classes) in split.tests.items():
                yield (size, method, name, prior), _measure(_predict(posterior, inputs), classes) | precision


def _validate(fitted: KroneckerLaplace, split: Split) -> KroneckerLaplace:
    """Return the posterior under the prior precision of the best validation likelihood, to an eighth of a decade."""
    inputs, classes = split.validation
    exponent = 2.0
    for step in (0.5, 0.125):
        candidates = [exponent + step * place for place in range(-2, 3)]
        losses = {
            candidate: negative_log_likelihood(_predict(fitted.with_prior_precision(10**candidate), inputs), classes)
            for candidate in candidates
        }
        exponent = min(losses, key=losses.__getitem__)
    return fitted.with_prior_precision(10**exponent)


def _predict(posterior: KroneckerLaplace, inputs: Tensor) -> Tensor:
    # The same draws for all methods, so that their differences are not those of the draws.
    generator = torch.Generator().manual_seed(0)
    return predict_linearised(posterior, inputs).sampled_probabilities(DRAWS, generator=generator)


def _measure(probabilities: Tensor, classes: Tensor) -> Values:
    return {
        "accuracy": float((probabilities.argmax(1) == classes).double().mean()),
        "negative_log_likelihood": negative_log_likelihood(probabilities, classes),
        "calibration_error": expected_calibration_error(probabilities, classes),
    }
