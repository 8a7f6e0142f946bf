"""Options of another kind, targets that fit no likelihood, and models that raise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cheapgrad.curvature.kronecker import (
    CategoricalOutputs,
    EmpiricalFisher,
    ExactFisher,
    GaussianOutputs,
    KroneckerOptions,
    WeightSharing,
    ekfac,
    kfac,
)
from cheapgrad.errors import ArgumentError, BatchError, CheapgradError, ForwardError, LossError, TargetError
from tests.curvature.kronecker.cases import double, randn

LABELS = torch.tensor([0, 1, 2, 1])


def _model() -> nn.Module:
    torch.manual_seed(0)
    return double(nn.Sequential(nn.Linear(3, 3)))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"sharing": "rubbish"},
            "sharing must be of type WeightSharing, but got a str 'rubbish'; use W",
        ),
        ({"fisher": EmpiricalFisher}, r"fisher must be of type AbstractFisher, but got the class EmpiricalFisher; use"),
        ({"fisher": "exact"}, "but got a str 'exact'"),
        ({"reader": None}, "reader must be of type BatchReader, but got a NoneType"),
    ],
)
def test_options_of_another_kind_are_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        KroneckerOptions(**options)


def test_what_is_no_options_is_named() -> None:
    with pytest.raises(ArgumentError, match="options must be of type KroneckerOptions, but got a dict of 0"):
        kfac(_model(), (randn(4, 3), LABELS), CategoricalOutputs(), options={})  # type: ignore[arg-type]
    assert KroneckerOptions(ExactFisher(), WeightSharing.REDUCE).sharing is WeightSharing.REDUCE


@pytest.mark.parametrize("build", [kfac, ekfac])
@pytest.mark.parametrize(
    ("targets", "likelihood", "error", "match"),
    [
        (torch.ones(4, 3), CategoricalOutputs(), LossError, r"shape \(4,\), but got torch.float32 of shape \(4, 3\)"),
        (torch.arange(3), CategoricalOutputs(), LossError, r"outputs of shape \(4, 3\) but targets of shape \(3,\)"),
        (torch.tensor(1), CategoricalOutputs(), LossError, r"targets of shape \(\)"),
        (
            torch.tensor([0, 9, 2, 1]),
            CategoricalOutputs(),
            TargetError,
            "1 of 4 .* from 0 to 2 were .* but got 9",
        ),
        (torch.tensor([0, -100, 2, -1]), CategoricalOutputs(), TargetError, "2 of 4 .* but got -100"),
        (LABELS, GaussianOutputs(), LossError, r"shape \(4, 3\), but got \(4,\)"),
    ],
)
def test_targets_that_do_not_fit_are_named_though_they_have_no_part(
    build: Any, targets: Tensor, likelihood: Any, error: type[CheapgradError], match: str
) -> None:
    with pytest.raises(error, match=match):
        build(_model(), (randn(4, 3), targets), likelihood)


def test_zeros_stand_for_no_targets() -> None:
    model = _model()
    without = kfac(model, (randn(4, 3), torch.zeros(4)), CategoricalOutputs())
    assert torch.equal(without.to_dense(), kfac(model, (randn(4, 3), LABELS), CategoricalOutputs()).to_dense())


@pytest.mark.parametrize(
    ("inputs", "error", "match"),
    [
        (randn(4, 5), ForwardError, r"forward pass of a Sequential on batch 0 raised .* \(inputs: \[4, 5\]"),
        (randn(0, 3), BatchError, "counts for 0 examples"),
    ],
)
def test_inputs_that_the_model_cannot_take_are_named(inputs: Tensor, error: type[CheapgradError], match: str) -> None:
    with pytest.raises(error, match=match):
        kfac(_model(), (inputs, LABELS[: len(inputs)]), CategoricalOutputs())


@pytest.mark.parametrize("variance", ["1", True, None, [1.0]])
def test_a_variance_that_is_no_number_is_named(variance: Any) -> None:
    with pytest.raises(LossError, match="must be a positive number, but got"):
        GaussianOutputs(variance)
