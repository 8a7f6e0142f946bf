"""Predicted FLOPs and saved bytes are the measured ones, to the last unit."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from cheapgrad.ops.linear import sketched_linear
from cheapgrad.ops.plan import Plan
from cheapgrad.sketch import LayerShape, LowRank, Poisson
from tests.sketch.cases import LAZY, PLACED, parametrized

SHAPES = [
    LayerShape(rows=21, inputs=11, outputs=6, examples=7),
    LayerShape(rows=130, inputs=48, outputs=80, examples=26),
    LayerShape(rows=64, inputs=64, outputs=64, examples=8, element_bytes=8),
]
STATIC = [row for row in PLACED if not isinstance(getattr(row[1], "design", None), Poisson)]
RANDOM_SIZE = [row for row in PLACED if isinstance(getattr(row[1], "design", None), Poisson)]


def _tensors(shape, *, x_needs_grad=True):
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[shape.element_bytes]
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes):
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    x = draw(shape.rows, shape.inputs).requires_grad_(x_needs_grad)
    return x, draw(shape.outputs, shape.inputs).requires_grad_(), draw(shape.rows, shape.outputs)


def _measure_flops(plan, shape):
    x, weight, cotangent = _tensors(shape)
    with FlopCounterMode(display=False) as counter:
        sketched_linear(x, weight, None, plan, examples=shape.examples).backward(cotangent)
    # The forward product is exact and not the strategy's.
    return counter.get_total_flops() - 2 * shape.rows * shape.inputs * shape.outputs


def _measure_saved_bytes(plan, shape, *, count_weight=False):
    x, weight, _ = _tensors(shape)
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = sketched_linear(x, weight, None, plan, examples=shape.examples)
    if not count_weight:
        held.pop(weight.untyped_storage().data_ptr())
    del output
    return sum(held.values())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("moment", "strategy"), parametrized(STATIC))
def test_flops(moment, strategy, shape):
    assert strategy.law.flops(shape, moment) == _measure_flops(Plan(**{moment.value: strategy}), shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("moment", "strategy"), parametrized(STATIC + LAZY))
def test_saved_bytes(moment, strategy, shape):
    plan = Plan(**{moment.value: strategy, f"{moment.value}_memory": strategy.new_memory()})
    assert strategy.law.saved_bytes(shape, moment) == _measure_saved_bytes(plan, shape)


@pytest.mark.parametrize(("moment", "strategy"), parametrized(RANDOM_SIZE))
def test_costs_of_a_random_size_hold_on_average(moment, strategy):
    plan, shape, draws = Plan(**{moment.value: strategy}), SHAPES[1], 200
    flops = torch.tensor([_measure_flops(plan, shape) for _ in range(draws)], dtype=torch.float64)
    saved = torch.tensor([_measure_saved_bytes(plan, shape) for _ in range(draws)], dtype=torch.float64)
    for measured, stated in ((flops, strategy.law.flops), (saved, strategy.law.saved_bytes)):
        standard_error = float(measured.std()) / draws**0.5
        assert abs(float(measured.mean()) - stated(shape, moment)) <= 5 * standard_error
        assert standard_error < 0.05 * stated(shape, moment)


def test_an_exact_plan_costs_what_pytorch_costs():
    shape = SHAPES[0]
    assert _measure_flops(Plan(), shape) == 4 * shape.rows * shape.inputs * shape.outputs
    assert _measure_saved_bytes(Plan(), shape) == shape.rows * shape.inputs * 4


@pytest.mark.parametrize(("moment", "strategy"), parametrized(PLACED))
def test_a_frozen_weight_saves_nothing_of_the_input(moment, strategy):
    x, weight, cotangent = _tensors(SHAPES[0])
    weight.requires_grad_(False)
    held = []

    def pack(tensor):
        held.append(tensor.untyped_storage().data_ptr())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = sketched_linear(x, weight, None, Plan(**{moment.value: strategy}), examples=SHAPES[0].examples)
    assert held == [weight.untyped_storage().data_ptr()]
    output.backward(cotangent)
    assert x.grad is not None


def test_the_lazy_basis_costs_its_own_products():
    """The range finder and the residual are matrix products too; between renewals only the residual is left."""
    shape, strategy = SHAPES[1], LowRank(rank=8, refresh=3)
    plan = Plan(stored=strategy, stored_memory=strategy.new_memory())
    counted = [_measure_flops(plan, shape) for _ in range(6)]
    extra = [flops - strategy.law.flops(shape, plan.stored.law.moments[0]) for flops in counted]
    projections = 4 * shape.rows * shape.inputs * (strategy.rank // 2)
    assert extra[1] == extra[2] == extra[4] == extra[5]
    assert extra[0] == extra[3] == extra[1] + projections
