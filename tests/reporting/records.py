"""Small records, most of them hand-written, for the tests of tables, pictures and sentences."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import cheapgrad
from cheapgrad.auditing.report import AuditReport
from cheapgrad.planning import HeldPart, Plan, PlanFigures, PlannedLayer
from cheapgrad.reporting import DemoRecord, MethodRecord, ModelRecord, StepRecord


def make_method(label: str = "exact", **changes) -> MethodRecord:
    values = {
        "label": label,
        "kind": "exact" if label == "exact" else "strategy",
        "family": label,
        "stored": None,
        "cotangent": None,
        "batch_size": 128,
        "accuracies": (0.97, 0.98, 0.99),
        "step_seconds": 0.020,
        "step_time_fraction": 1.0,
        "held_bytes": 3 * 1024 * 1024,
        "held_bytes_fraction": 1.0,
        "predicted_relative_variance": 0.0,
        "measured_relative_variance": 0.0,
        "measured_relative_variance_standard_error": 0.0,
        "noise_fraction": 0.0,
        "draws": 256,
        "max_abs_z": 0.0,
        "band": 7.0,
        "detectable_relative_bias": 0.0,
        "unbiased": True,
    }
    return MethodRecord(**{**values, **changes})


def make_rows(**changes) -> MethodRecord:
    values = {
        "family": "cotangent rows",
        "cotangent": "RowSample(keep=0.5)",
        "accuracies": (0.965, 0.975, 0.985),
        "step_seconds": 0.015,
        "step_time_fraction": 0.75,
        "predicted_relative_variance": 0.1,
        "measured_relative_variance": 0.12,
        "noise_fraction": 0.2,
        "max_abs_z": 4.5,
        "detectable_relative_bias": 0.05,
    }
    return make_method("cotangent rows 0.5", **{**values, **changes})


def make_bits(**changes) -> MethodRecord:
    values = {
        "family": "stored bits",
        "stored": "StochasticRounding(bits=4, group=64)",
        "held_bytes": 2 * 1024 * 1024,
        "held_bytes_fraction": 2 / 3,
        "step_seconds": 0.024,
        "step_time_fraction": 1.2,
        "predicted_relative_variance": 0.0004,
        "measured_relative_variance": 0.0004,
        "noise_fraction": 0.001,
        "max_abs_z": 4.0,
        "detectable_relative_bias": 0.01,
    }
    return make_method("stored 4 bits", **{**values, **changes})


def make_record(*methods: MethodRecord, seeds=(0, 1, 2)) -> DemoRecord:
    methods = methods or (make_method(), make_rows(), make_bits())
    model = ModelRecord("DigitsViT", "two blocks", 102_090, 110, 128, 64, methods)
    wide = (
        StepRecord("wide network", "exact", "exact", 0.2, 1.0),
        StepRecord("wide network", "cotangent rows 0.5", "strategy", 0.15, 0.75),
        StepRecord("wide network", "stored 4 bits", "strategy", 0.22, 1.1),
    )
    return DemoRecord("digits", seeds, 100.0, {"python": "3.11", "workers": 2}, (model,), wide)


def make_audit(model: nn.Module) -> AuditReport:
    """Audit a model of 4 inputs and 3 classes."""
    batch = torch.randn(16, 4), torch.randint(0, 3, (16,))
    return cheapgrad.audit(model, lambda model, batch: cross_entropy(model(batch[0]), batch[1]), batch, draws=8)


def make_plan(*layers: PlannedLayer, held: tuple[HeldPart, ...] = ()) -> Plan:
    return Plan(
        budgets={"memory": "25 %"},
        exact=PlanFigures(1000, 10, 20, 0.0),
        predicted=PlanFigures(250, 10, 15, 0.05),
        layers=layers,
        noise_standard_error=0.001,
        separate_noise_fraction=0.05,
        batches=4,
        remarks=("a remark",),
        held=held,
    )
