"""What torch returns at its kinks, as it has been: a change of torch shows here first."""

from __future__ import annotations

import math

import pytest
import torch

from cheapgrad.kinks import measure_torch_conventions

NAN, INF = math.nan, math.inf
SELU_SLOPE = 1.6732632423543772 * 1.0507009873554805

EXPECTED = {
    "relu(x)": (0,),
    "clamp(x, min=0)": (1,),
    "clamp(x, -1, 1)": (1, 1),
    "where(x > 0, x, 0)": (0,),
    "where(x >= 0, x, 0)": (1,),
    "threshold(x, 0, 0)": (0,),
    "relu6(x)": (0, 0),
    "hardtanh(x)": (0, 0),
    "hardswish(x)": (0, 1),
    "hardsigmoid(x)": (0, 0),
    "softshrink(x, 0.5)": (0, 0),
    "leaky_relu(x, 0.5)": (0.5,),
    "prelu(x, 0.5)": (0.5,),
    "elu(x, 0.5)": (0.5,),
    "selu(x)": (SELU_SLOPE,),
    "abs(x)": (0,),
    "l1_loss(x, 0)": (0,),
    "hinge_embedding_loss(x, -1)": (-1,),
    "margin_ranking_loss(x, 0, 1)": (-1,),
    "maximum(x[0], x[1])": (0.5, 0.5),
    "minimum(x[0], x[1])": (0.5, 0.5),
    "fmax(x[0], x[1])": (1, 0),
    "fmin(x[0], x[1])": (1, 0),
    "max(x)": (0.5, 0.5),
    "min(x)": (0.5, 0.5),
    "amax(x)": (0.5, 0.5),
    "amin(x)": (0.5, 0.5),
    "max(x, dim=0)": (1, 0),
    "median(x)": (0.5, 0.5),
    "norm(x, inf)": (0.5, 0.5),
    "logsumexp(x)": (0.5, 0.5),
    "topk(x, 1)": (1, 0),
    "sort(x)[0]": (1, 0),
    "max_pool1d(x, 2)": (1, 0),
    "max_pool2d(x, (1, 2))": (1, 0),
    "adaptive_max_pool1d(x, 1)": (1, 0),
    "norm(x, 1)": (0, 0),
    "norm(x, 2)": (0, 0),
    "sqrt(x)": (INF,),
    "sqrt(sum(x²))": (NAN, NAN),
    "relu(x) - relu(-x), which is x": (0,),
    "relu(-x) + x - relu(x), which is 0": (1,),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_conventions_of_torch_are_what_they_were(dtype):
    found = {row.function: row.gradient for row in measure_torch_conventions(dtype=dtype)}
    assert list(found) == list(EXPECTED)
    tolerance = torch.finfo(dtype).eps
    for function, gradient in EXPECTED.items():
        assert found[function] == pytest.approx(gradient, rel=tolerance, nan_ok=True), function


@pytest.mark.gpu
def test_conventions_on_a_gpu_are_those_on_the_cpu():
    found = {row.function: row.gradient for row in measure_torch_conventions("cuda")}
    for function, gradient in EXPECTED.items():
        assert found[function] == pytest.approx(gradient, rel=1e-6, nan_ok=True), function
