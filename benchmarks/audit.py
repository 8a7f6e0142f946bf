"""Audits of unbiased methods, which should raise no alarm, and of planted mistakes, which should."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional

import cheapgrad
from cheapgrad import AuditReport, Rule, audit, audit_step
from cheapgrad.demo.data import load_data
from cheapgrad.demo.models import DigitsMLP, DigitsViT
from cheapgrad.sketch import (
    ColumnSample,
    ElementMask,
    ExampleSample,
    FeatureSample,
    LowRank,
    RowProjection,
    RowSample,
    StochasticRounding,
)
from tests.auditing import planted

BATCH, TRAINING_STEPS = 32, 30
SEEDS_OF_METHODS, SEEDS_OF_MISTAKES = 9, 5
ONE_PERCENT = 1.01

METHODS: dict[str, dict[str, Any]] = {
    "stochastic rounding, 2 bits": {"stored": StochasticRounding(bits=2)},
    "stochastic rounding, 4 bits": {"stored": StochasticRounding(bits=4)},
    "rows of the cotangent, half": {"cotangent": RowSample(keep=0.5)},
    "rows of the cotangent, a tenth": {"cotangent": RowSample(keep=0.1)},
    "stored rows, half": {"stored": RowSample(keep=0.5)},
    "columns, half": {"cotangent": ColumnSample(keep=0.5)},
    "stored features, half": {"stored": FeatureSample(keep=0.5)},
    "entries, half": {"cotangent": ElementMask(keep=0.5)},
    "projected rows, half": {"stored": RowProjection(keep=0.5)},
    "examples, half": {"cotangent": ExampleSample(keep=0.5)},
    "low rank, 8": {"cotangent": LowRank(rank=8)},
    "4 bits and rows, half": {"stored": StochasticRounding(bits=4), "cotangent": RowSample(keep=0.5)},
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": functools.partial(DigitsMLP, 64),
    "transformer": functools.partial(DigitsViT, width=32, depth=1, heads=2),
}
# Where each network's mistake is planted.
PLACES = {"perceptron": "layers.2", "transformer": "blocks.0.mlp.0"}


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy."""
    return functional.cross_entropy(model(batch[0]), batch[1])


def measure_audits(
    *, seeds: int = SEEDS_OF_METHODS, finished: Mapping[str, dict[str, Any]] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield false alarms of every method and hits of every mistake, at the default number of draws.

    Args:
        seeds: networks trained and batches per method and architecture; mistakes take fewer.
        finished: records of an interrupted run by method; what they hold is not measured again.
    """
    rows = [
        (name, "unbiased", functools.partial(_audit_method, strategies), seeds) for name, strategies in METHODS.items()
    ]
    fewer = min(seeds, SEEDS_OF_MISTAKES)
    rows += [(name, "mistake", run, fewer) for name, run in _list_mistakes().items()]
    records = []
    for name, kind, run, count in track(rows, description="audits"):
        record = (finished or {}).get(name, {})
        if record.get("audits") != count * len(NETWORKS):
            record = _summarise(name, kind, [run(network, seed) for network in NETWORKS for seed in range(count)])
        records.append(record)
        yield record
    for kind in ("unbiased", "mistake"):
        of_kind = [record for record in records if record["kind"] == kind]
        sums = {key: sum(record[key] for record in of_kind) for key in ("audits", "alarms", "first_alarms")}
        yield {"benchmark": "audit", "method": f"all: {kind}", "kind": kind, **sums}


def _audit_method(strategies: dict[str, Any], network: str, seed: int) -> AuditReport:
    return audit(_convert(network, seed, strategies), loss_fn, _make_batch(seed), seed=seed, progress=False)


def _summarise(name: str, kind: str, reports: list[AuditReport]) -> dict[str, Any]:
    finite = [report.max_abs_z / report.band for report in reports if math.isfinite(report.max_abs_z)]
    return {
        "benchmark": "audit",
        "method": name,
        "kind": kind,
        "audits": len(reports),
        "alarms": sum(not report.unbiased for report in reports),
        # Alarms of the first 64 draws, before the 64 that confirm or dismiss them.
        "first_alarms": sum(report.confirmed for report in reports),
        "relative_variance": sum(report.relative_variance for report in reports) / len(reports),
        "noise_fraction": sum(report.noise_fraction or 0.0 for report in reports) / len(reports),
        "largest_z_per_band": max(finite, default=None),
        "smallest_z_per_band": min(finite, default=None),
        "detectable_in_all": max(report.detectable_relative_bias for report in reports),
        "detectable_in_each_parameter": max(
            layer.detectable_relative_bias for report in reports for layer in report.layers
        ),
    }


@functools.cache
def _train(network: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = NETWORKS[network]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch, _ in zip(load_data().batches(64, seed), range(TRAINING_STEPS), strict=False):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    return model


def _make_batch(seed: int) -> tuple[Tensor, Tensor]:
    return next(load_data().batches(BATCH, 1000 + seed))


def _copy(network: str, seed: int) -> nn.Module:
    model = NETWORKS[network]()
    model.load_state_dict(_train(network, seed).state_dict())
    return model


def _convert(network: str, seed: int, strategies: dict[str, Any]) -> nn.Module:
    model = _copy(network, seed)
    cheapgrad.approximate(model, Rule("*", **strategies), skip_small=False)
    return model


def _list_mistakes() -> dict[str, Callable[[str, int], AuditReport]]:
    return {
        "1 % too long": functools.partial(_audit_too_long, strategies=None),
        "1 % too long, 4 bits": functools.partial(_audit_too_long, strategies=METHODS["stochastic rounding, 4 bits"]),
        "1 % too long, rows, half": functools.partial(
            _audit_too_long, strategies=METHODS["rows of the cotangent, half"]
        ),
        "top half of the rows without weights": functools.partial(_audit_own, backward=planted.top_rows),
        "sampled rows without 1/p": functools.partial(_audit_own, backward=planted.sampled_rows(weighted=False)),
        "indices drawn again in backward": functools.partial(_audit_own, backward=planted.sampled_twice),
        "mean of means over unequal micro-batches": functools.partial(_audit_loop, mistake="mean of means"),
        "accumulated, not divided": functools.partial(_audit_loop, mistake="not divided"),
        "accumulated, divided twice": functools.partial(_audit_loop, mistake="divided twice"),
    }


def _audit_too_long(network: str, seed: int, strategies: dict[str, Any] | None) -> AuditReport:
    """Audit a network with one weight's gradient 1 % too long, against the same without."""
    model = _copy(network, seed) if strategies is None else _convert(network, seed, strategies)
    factor = [ONE_PERCENT]
    weight: Any = model.get_submodule(PLACES[network]).weight
    weight.register_hook(lambda gradient: gradient * factor[0])

    def reference(model: nn.Module, batch: Any) -> list[Tensor]:
        factor[0] = 1.0
        try:
            with cheapgrad.get_handle(model).exact() if strategies else contextlib.nullcontext():
                return list(torch.autograd.grad(loss_fn(model, batch), list(model.parameters())))
        finally:
            factor[0] = ONE_PERCENT

    return audit(model, loss_fn, _make_batch(seed), reference=reference, seed=seed, progress=False)


def _audit_own(network: str, seed: int, backward: planted.Backward) -> AuditReport:
    """Audit a network in which one linear layer has a backward pass of its own, against the stock layer."""
    model = _copy(network, seed)
    stock: Any = model.get_submodule(PLACES[network])
    own = planted.OwnLinear(stock.in_features, stock.out_features, backward)
    own.load_state_dict(stock.state_dict())
    parent, _, name = PLACES[network].rpartition(".")
    setattr(model.get_submodule(parent), name, own)

    def reference(model: nn.Module, batch: Any) -> Tensor:
        own.exact = True
        try:
            return loss_fn(model, batch)
        finally:
            own.exact = False

    return audit(model, loss_fn, _make_batch(seed), reference=reference, seed=seed, progress=False)


def _audit_loop(network: str, seed: int, mistake: str) -> AuditReport:
    """Audit a loop over three micro-batches of unequal size."""
    model, (x, y) = _copy(network, seed), _make_batch(seed)
    parts = torch.arange(BATCH).split([4, 8, BATCH - 12])

    def accumulate() -> None:
        for part in parts:
            right = len(part) / BATCH
            weight = {"mean of means": 1 / len(parts), "not divided": 1.0, "divided twice": right / len(parts)}[mistake]
            (loss_fn(model, (x[part], y[part])) * weight).backward()

    return audit_step(model, loss_fn, (x, y), accumulate, seed=seed, progress=False)
