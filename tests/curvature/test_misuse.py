"""What the tools on top of operators refuse: arguments of another kind, empty batches, numbers that are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cheapgrad.curvature import (
    BatchQuadratic,
    ConjugateGradientSettings,
    DenseOperator,
    InverseFisher,
    LayerBits,
    MeanOperator,
    MicroBatch,
    allocate_bits,
    as_operator,
    bias_report,
    bottom_eigenpairs,
    correct_inverse,
    debiased_conjugate_gradient,
    estimate_gauss_newton_diagonal,
    estimate_hessian_diagonal,
    gauss_newton_step,
    measure_sensitivities,
    quantization_penalty,
    run_conjugate_gradient,
    shrink_eigenvalues,
    spectral_density,
    split_sample,
    top_eigenpairs,
    top_singular_values,
)
from cheapgrad.errors import (
    ArgumentError,
    BatchError,
    BudgetError,
    CheapgradError,
    ForwardError,
    NonFiniteCurvatureError,
    OverlapError,
    ShapeError,
)

EYE = torch.eye(2, dtype=torch.float64)
ONES = torch.ones(2, dtype=torch.float64)
QUADRATIC = BatchQuadratic(EYE, ONES)


def _logits() -> tuple[Tensor, nn.Linear]:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    return layer(torch.randn(5, 3)), layer


class TestDiagonalsNeedTensors:
    @pytest.mark.parametrize("estimate", [estimate_hessian_diagonal, estimate_gauss_newton_diagonal])
    @pytest.mark.parametrize(
        ("pick", "match"),
        [
            (lambda layer: layer.bias, r"but got a Parameter of shape \(3,\); use \[tensor\]"),
            (lambda layer: layer, "but got a Linear"),
            (lambda layer: [], "but got a list of 0"),
            (lambda layer: dict(layer.named_parameters()), "but got a dict of 2"),
            (lambda layer: [layer.bias, torch.ones(2)], r"parameter 1 of shape \(2,\) does not require grad"),
        ],
    )
    def test_what_is_no_list_of_parameters_is_named(self, estimate, pick, match):
        logits, layer = _logits()
        result = logits if estimate is estimate_gauss_newton_diagonal else logits.logsumexp(1).sum()
        with pytest.raises(ArgumentError, match=match):
            estimate(result, pick(layer))

    def test_any_iterable_of_tensors_is_one(self):
        logits, layer = _logits()
        loss = logits.logsumexp(1).sum()
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        listed = estimate_hessian_diagonal(loss, list(layer.parameters()), generator=generators[0])
        generated = estimate_hessian_diagonal(loss, layer.parameters(), generator=generators[1])
        assert all(torch.equal(one, other) for one, other in zip(listed, generated, strict=True))
        assert all(float(each.abs().sum()) > 0 for each in listed)


class TestOneMatrixTwice:
    @pytest.mark.parametrize("make", [lambda: EYE.clone(), lambda: EYE.numpy().copy(), lambda: np.diag([1.0, 2.0])])
    @pytest.mark.parametrize("again", [lambda matrix: matrix, lambda matrix: matrix[:], lambda matrix: matrix.T])
    def test_the_same_memory_is_refused(self, make, again):
        matrix = make()
        for measure in (split_sample, bias_report):
            with pytest.raises(OverlapError, match="share 1 of 1 micro-batches"):
                measure(matrix, again(matrix), 1)
        parts = MeanOperator([as_operator(make()), as_operator(again(matrix))])
        with pytest.raises(OverlapError, match="share 1 of 2"):
            split_sample(matrix, parts, 1)
        assert float(split_sample(matrix, make(), 1).held_out) > 0

    def test_an_operator_of_another_library_is_known_again(self):
        class Foreign:
            shape, dtype = (2, 2), torch.float64

            def __matmul__(self, operand: Tensor) -> Tensor:
                return operand

        one = Foreign()
        with pytest.raises(OverlapError, match="share 1 of 1"):
            split_sample(one, one, 1)
        assert float(split_sample(one, Foreign(), 1).held_out) == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: top_eigenpairs(EYE, settings={}), ArgumentError, "settings must be of type LanczosSettings"),
        (lambda: bottom_eigenpairs(EYE, settings=3), ArgumentError, "but got an int 3"),
        (lambda: top_singular_values(EYE, settings=[]), ArgumentError, "but got a list of 0"),
        (lambda: run_conjugate_gradient(EYE, ONES, {}), ArgumentError, "ConjugateGradientSettings, but got a dict"),
        (
            lambda: debiased_conjugate_gradient(QUADRATIC, QUADRATIC, {}),
            ArgumentError,
            "ConjugateGradientSettings, but got a dict of 0",
        ),
        (lambda: debiased_conjugate_gradient(EYE, EYE), ArgumentError, "quadratic_a must be of type BatchQuadratic"),
        (lambda: BatchQuadratic(EYE, [1.0, 1.0]), ArgumentError, "gradient must be of type Tensor"),
        (lambda: DenseOperator([[1.0]]), ArgumentError, "matrix must be of type Tensor, but got a list of 1"),
        (
            lambda: split_sample(EYE, 2 * EYE, 1, gradients=3),
            ArgumentError,
            r"\(gradient_a, gradient_b\), but got an",
        ),
        (lambda: split_sample(EYE, 2 * EYE, 1, gradients=(1, 2)), ArgumentError, "pair of tensors .* a tuple of 2"),
        (lambda: shrink_eigenvalues([1.0, 2.0], 5), ArgumentError, "eigenvalues must be of type Tensor"),
        (lambda: correct_inverse(2.0, 0.1), ArgumentError, "estimate must be of type Tensor, but got a float 2.0"),
        (lambda: correct_inverse(ONES, 0.1), ArgumentError, "variance must be of type Tensor"),
        (lambda: correct_inverse(ONES, ONES[:1]), ShapeError, r"\(2,\) and \(1,\)"),
        (lambda: InverseFisher([1.0], damping=1.0), ArgumentError, "gradients must be of type Tensor"),
        (lambda: allocate_bits("ab", 3.0), ArgumentError, r"layers\[0\] must be of type LayerBits, but got a str 'a'"),
        (lambda: allocate_bits([LayerBits("a", (4,), (1.0,), (1.0,)), 2], 3.0), ArgumentError, r"layers\[1\]"),
        (lambda: measure_sensitivities([1]), ArgumentError, "operators must be of type Mapping"),
        (lambda: measure_sensitivities({"0": EYE}), ArgumentError, r"layer '0' must have a pair .* of shape \(2, 2\)"),
        (lambda: quantization_penalty(torch.ones(0, 3), 4, 1.0), ShapeError, r"at least one entry, .*\(0, 3\)"),
        (lambda: quantization_penalty(ONES * torch.nan, 4, 1.0), NonFiniteCurvatureError, "2 of 2 weights"),
        (lambda: quantization_penalty(ONES, 4, "1"), BudgetError, "trace='1'"),
        (lambda: split_sample(EYE, torch.eye(3).double(), 1), ShapeError, "operator a is 2×2, but operator b is 3×3"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call: Callable[[], Any], error: type[CheapgradError], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize(
    ("size", "error", "match"),
    [
        (-1, BudgetError, "population_size must be a whole number of at least 1, but got -1"),
        (2.5, BudgetError, "population_size .* but got 2.5"),
        (5, OverlapError, "32 and 96 examples .* population of 5; the first alone is larger"),
        (100, OverlapError, "population of 100; leave at most 68 to the second"),
    ],
)
def test_population_sizes_out_of_range_are_named(size: Any, error: type[CheapgradError], match: str) -> None:
    first, second = (MeanOperator([MicroBatch(as_operator(EYE.clone()), 1.0, count)]) for count in (32, 96))
    with pytest.raises(error, match=match):
        split_sample(first, second, 1, population_size=size)


class TestDensity:
    # Of rank 2: runs end after three of six steps, and the rest of the nodes has no weight.
    DENSITY = spectral_density(torch.diag(torch.tensor([1.0, 1, 1, 3, 3, 3])).double(), probes=3, steps=6)

    def test_nodes_without_weight_do_not_count(self):
        # Some of them are at 0, where the logarithm is not defined: the spectrum itself is positive.
        assert float(self.DENSITY.nodes.abs().min()) < 1e-9
        assert self.DENSITY.integrate(lambda nodes: torch.ones_like(nodes)).value == pytest.approx(6)
        assert torch.isfinite(torch.tensor(self.DENSITY.integrate(torch.log).value))

    @pytest.mark.parametrize(
        ("function", "error", "match"),
        [
            (lambda nodes: nodes * torch.nan, NonFiniteCurvatureError, "not finite at 6 of 18 nodes, first at"),
            (lambda nodes: (nodes - 2).log(), NonFiniteCurvatureError, "not finite at 3 of 18 nodes, first at 1;"),
            (lambda nodes: 1.0, ShapeError, r"shape \(3, 6\), but returned a float 1.0"),
            (lambda nodes: nodes.sum(), ShapeError, r"returned a Tensor of shape \(\)"),
        ],
    )
    def test_functions_that_are_not_defined_are_named(self, function, error, match):
        with pytest.raises(error, match=match):
            self.DENSITY.integrate(function)


@pytest.mark.parametrize(
    ("inputs", "targets", "error", "match"),
    [
        (torch.ones(0, 2), torch.ones(0, 1), BatchError, r"at least one, .* shapes \(0, 2\) and \(0, 1\)"),
        (torch.ones(3, 2), torch.ones(2, 1), BatchError, r"\(3, 2\) and \(2, 1\)"),
        ([1.0], torch.ones(1, 1), ArgumentError, "inputs must be of type Tensor, but got a list of 1"),
        (torch.ones(3, 5), torch.ones(3, 1), ForwardError, r"a Linear on single examples raised .*\[3, 5\]"),
        (torch.ones(3, 2), torch.ones(3, 4, 7), ForwardError, r"loss of the first example raised .* target: \[4, 7\]"),
    ],
)
def test_batches_that_a_gauss_newton_step_cannot_take_are_named(
    inputs: Any, targets: Tensor, error: type[CheapgradError], match: str
) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output.view(target.shape) - target).square().sum()

    with pytest.raises(error, match=match):
        gauss_newton_step(nn.Linear(2, 1), loss, inputs, targets, damping=1.0)


def test_settings_of_the_right_kind_pass() -> None:
    assert run_conjugate_gradient(EYE, ONES, ConjugateGradientSettings(iterations=1)).slopes.numel() == 1
