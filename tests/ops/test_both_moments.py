"""Strategies at both moments of one layer: no atom of either gradient may have probability zero."""

import pytest
import torch

from cheapgrad.ops.linear import sketched_linear
from cheapgrad.ops.plan import Plan
from cheapgrad.sketch import ColumnNorm, ColumnSample, JointNorm, RowSample, StochasticRounding

# Odd sizes; a weight row of zeros, whose cotangent column is not zero.
ROWS, INPUTS, OUTPUTS, DRAWS = 7, 3, 5, 3000


@pytest.mark.parametrize("stored", [None, RowSample(0.7), StochasticRounding(8)], ids=repr)
@pytest.mark.parametrize("scores", [ColumnNorm(), JointNorm()], ids=repr)
def test_a_weight_row_of_zeros_still_gets_its_gradient(stored, scores):
    torch.manual_seed(0)
    x = torch.randn(ROWS, INPUTS, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(OUTPUTS, INPUTS, dtype=torch.float64)
    weight[2] = 0
    weight.requires_grad_()
    grad = torch.randn(ROWS, OUTPUTS, dtype=torch.float64)
    plan = Plan(stored=stored, cotangent=ColumnSample(0.6, scores=scores))
    draws = torch.stack(
        [torch.autograd.grad(sketched_linear(x, weight, None, plan), weight, grad)[0][2] for _ in range(DRAWS)]
    )
    exact = (grad.mT @ x.detach())[2]
    error = draws.mean(0) - exact
    standard_error = draws.std(0) / DRAWS**0.5
    # Bonferroni over 6 cases and 3 entries at 1e-6; the sample must also be able to tell zero from the truth.
    assert (error.abs() <= 5.5 * standard_error).all()
    assert (standard_error.max() < 0.1 * exact.norm()).all()
