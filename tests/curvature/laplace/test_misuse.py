"""Posteriors of parts that do not belong together, and probabilities that are none."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cheapgrad.curvature.kronecker import CategoricalOutputs, GaussianOutputs, KroneckerCurvature, kfac
from cheapgrad.curvature.laplace import (
    KroneckerLaplace,
    add_noise,
    expected_calibration_error,
    fit_laplace,
    log_marginal_likelihood,
    negative_log_likelihood,
    predict_linearised,
    sample_outputs,
    sum_log_likelihood,
)
from cheapgrad.errors import (
    ArgumentError,
    BatchError,
    BudgetError,
    CheapgradError,
    ForwardError,
    OperatorError,
    ProbabilityError,
    ShapeError,
    TargetError,
)
from tests.curvature.kronecker.cases import double, randn

LABELS = torch.tensor([0, 1, 2, 1])


def _fit(likelihood: Any = None) -> tuple[nn.Module, KroneckerCurvature, KroneckerLaplace]:
    torch.manual_seed(0)
    likelihood = likelihood or CategoricalOutputs()
    model = double(nn.Sequential(nn.Linear(3, 3)))
    curvature = kfac(model, (randn(4, 3), torch.zeros(4)), likelihood)
    return model, curvature, fit_laplace(model, curvature, likelihood, dataset_size=4)


class TestPartsThatDoNotBelongTogether:
    def test_the_likelihood_is_that_of_the_curvature(self):
        model, curvature, _ = _fit(GaussianOutputs(2.0))
        for other in (CategoricalOutputs(), GaussianOutputs(3.0)):
            with pytest.raises(OperatorError, match=r"that of GaussianOutputs\(variance=2.0\), but .* given is"):
                fit_laplace(model, curvature, other, dataset_size=4)
        scaled = curvature.replace_eigenvalues(lambda _, values: 2 * values)
        with pytest.raises(OperatorError, match=r"that of GaussianOutputs\(variance=2.0\)"):
            fit_laplace(model, scaled, CategoricalOutputs(), dataset_size=4)
        assert fit_laplace(model, scaled, GaussianOutputs(2.0), dataset_size=4).dataset_size == 4

    def test_the_model_is_that_of_the_curvature(self):
        model, curvature, _ = _fit()
        with pytest.raises(OperatorError, match="1 of 1 layers of the curvature, first '0', are not those"):
            fit_laplace(copy.deepcopy(model), curvature, CategoricalOutputs(), dataset_size=4)

    @pytest.mark.parametrize(
        ("changes", "error", "match"),
        [
            ({"dataset_size": "a"}, BudgetError, "dataset_size must be a finite number above 0, but got a str 'a'"),
            ({"dataset_size": float("inf")}, BudgetError, "but got inf"),
            ({"dataset_size": True}, BudgetError, "but got True"),
            ({"prior_precision": [1.0]}, BudgetError, r"layer '0' must be positive and finite, but got \[1.0\]"),
            ({"prior_precision": "1"}, BudgetError, "but got '1'"),
            ({"reader": {}}, ArgumentError, "reader must be of type BatchReader"),
            ({"likelihood": "categorical"}, ArgumentError, "likelihood must be of type AbstractOutputs"),
            ({"model": 3}, ArgumentError, "model must be of type Module, but got an int 3"),
        ],
    )
    def test_arguments_of_another_kind_are_named(self, changes, error, match):
        model, curvature, _ = _fit()
        arguments = {"model": model, "curvature": curvature, "likelihood": CategoricalOutputs(), "dataset_size": 4}
        with pytest.raises(error, match=match):
            fit_laplace(**(arguments | changes))  # type: ignore[arg-type]

    @pytest.mark.parametrize("value", [float("nan"), float("-inf"), "a", torch.tensor([1.0])])
    def test_a_likelihood_that_is_no_number_is_named(self, value):
        with pytest.raises(BudgetError, match="log_likelihood must be a finite number, but got"):
            log_marginal_likelihood(_fit()[2], value)

    def test_noise_is_that_of_real_targets(self):
        with pytest.raises(ArgumentError, match="of type GaussianOutputs, but got a CategoricalOutputs; classes have"):
            add_noise(predict_linearised(_fit()[2], randn(2, 3)), CategoricalOutputs())  # type: ignore[arg-type]


def test_inputs_that_the_model_cannot_take_are_named() -> None:
    posterior = _fit()[2]
    with pytest.raises(BatchError, match=r"at least one, .* but got a Tensor of shape \(0, 3\)"):
        predict_linearised(posterior, randn(0, 3))
    with pytest.raises(BatchError, match="but got an int 3"):
        predict_linearised(posterior, 3)
    with pytest.raises(ForwardError, match=r"on batch 0 raised .* \(inputs: \[4, 5\]"):
        predict_linearised(posterior, randn(4, 5))
    with pytest.raises(ForwardError, match=r"the forward pass of a Sequential raised .* \(inputs: \[4, 5\]"):
        sample_outputs(posterior, randn(4, 5), 1)
    with pytest.raises(ForwardError, match=r"batch 0 raised .* \(inputs: \[4, 5\]"):
        sum_log_likelihood(posterior, (randn(4, 5), LABELS))
    with pytest.raises(TargetError, match=r"1 of 4 targets .* but got 9"):
        sum_log_likelihood(posterior, (randn(4, 3), torch.tensor([0, 9, 1, 1])))


@pytest.mark.parametrize("measure", [negative_log_likelihood, expected_calibration_error])
@pytest.mark.parametrize(
    ("rows", "classes", "error", "match"),
    [
        (torch.tensor([[0.5, 0.5], [3.0, -1.0]]), LABELS[:2], ProbabilityError, "1 of 2 rows .* row 1 has .* -1 to 3"),
        (torch.tensor([[2.0, 1.0]]), LABELS[:1], ProbabilityError, r"sum 3; for logits use logits.softmax\(-1\)"),
        (torch.tensor([[1.5, -0.5]]), LABELS[:1], ProbabilityError, "from -0.5 to 1.5 of sum 1"),
        (torch.tensor([[torch.nan, 0.5]]), LABELS[:1], ProbabilityError, "1 of 1 rows"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([2]), TargetError, "from 0 to 1 were expected, but got 2"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([1.0]), TargetError, "but got 1.0 of torch.float32"),
        (torch.tensor([[0.5, 0.5]]), LABELS, ShapeError, r"\(1, 2\) and \(4,\)"),
        ([[0.5, 0.5]], LABELS[:1], ArgumentError, "probabilities must be of type Tensor, but got a list of 1"),
    ],
)
def test_what_is_no_probability_or_class_is_named(
    measure: Any, rows: Any, classes: Tensor, error: type[CheapgradError], match: str
) -> None:
    with pytest.raises(error, match=match):
        measure(rows, classes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_probabilities_with_a_graph_or_few_digits_pass_without_a_warning(dtype: torch.dtype) -> None:
    logits = randn(50, 40).to(dtype).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for measure in (negative_log_likelihood, expected_calibration_error):
            assert measure(logits.softmax(-1), torch.arange(50) % 40) > 0
