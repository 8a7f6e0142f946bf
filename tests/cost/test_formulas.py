"""The registry of formulas, and operations that have none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cheapgrad
from cheapgrad.cost import find_formula, formulas, register_formula
from cheapgrad.errors import FormulaError


@torch.library.custom_op("cheapgrad_tests::mix", mutates_args=())
def mix(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight


@torch.library.custom_op("cheapgrad_tests::mix_backward", mutates_args=())
def mix_backward(cotangent: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return cotangent @ weight.T, x.T @ cotangent


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, cotangent):
    return torch.ops.cheapgrad_tests.mix_backward(cotangent, *ctx.saved_tensors)


mix.register_fake(lambda x, weight: x.new_empty(x.shape[0], weight.shape[1]))
mix_backward.register_fake(lambda cotangent, x, weight: (torch.empty_like(x), torch.empty_like(weight)))
mix.register_autograd(_backward, setup_context=_save)


class Mixes(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4))

    def forward(self, x):
        return torch.ops.cheapgrad_tests.mix(x, self.weight).relu()


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(formulas, "_registered", {})


def test_operation_without_a_formula_is_listed_first():
    report = cheapgrad.scan(Mixes(), torch.randn(6, 8))
    assert report.total.flops == 0
    assert report.uncounted[: report.unknown] == ("cheapgrad_tests::mix", "cheapgrad_tests::mix_backward")
    assert "aten::relu" in report.uncounted[report.unknown :]
    assert "NOT counted, of unknown cost: cheapgrad_tests::mix" in str(report)


@pytest.mark.parametrize("fake", [False, True])
def test_registered_formulas_are_used(fake):
    product = 2 * 6 * 8 * 4
    register_formula(torch.ops.cheapgrad_tests.mix, lambda x, weight, out: 2 * out.numel() * x.shape[1])
    register_formula(
        torch.ops.cheapgrad_tests.mix_backward.default, lambda grad, x, w, out: 4 * grad.shape[0] * w.numel()
    )
    report = cheapgrad.scan(Mixes(), torch.randn(6, 8), fake=fake)
    assert (report.total.forward_flops, report.total.backward_flops) == (product, 2 * product)
    assert report.unknown == 0
    [cost] = [cost for cost in report.operations if cost.forward_flops]
    # Backward FLOPs and the saved input stand with the operation of the forward pass.
    assert (cost.operation, cost.calls) == ("cheapgrad_tests::mix", 1)
    assert (cost.backward_flops, cost.saved_bytes) == (2 * product, 6 * 8 * 4)


def test_formula_registered_with_torch_is_used():
    from torch.utils import flop_counter

    packet = torch.ops.cheapgrad_tests.mix
    flop_counter.register_flop_formula(packet)(lambda x, weight, out_shape=None: x[0] * weight[1])
    try:
        assert cheapgrad.scan(Mixes(), torch.randn(6, 8)).total.forward_flops == 6 * 4
    finally:
        del flop_counter.flop_registry[packet]


def test_second_formula_needs_replace():
    with pytest.raises(FormulaError, match="aten::mm has a formula already; pass replace=True"):
        register_formula(torch.ops.aten.mm, lambda *args, out: 1)
    register_formula(torch.ops.aten.mm, lambda *args, out: 1, replace=True)
    assert find_formula(torch.ops.aten.mm.default)(out=None) == 1


def test_what_is_no_operation_is_refused():
    with pytest.raises(FormulaError, match=r"such as torch.ops.mylib.fused, but got .* of type builtin_function"):
        register_formula(torch.mm, lambda *args, out: 1)
    with pytest.raises(FormulaError, match=r"the formula of aten::relu must be a function .* but is 3"):
        register_formula(torch.ops.aten.relu, 3)


@pytest.mark.parametrize("answer", [-1, 2.0, None, True])
def test_formula_has_to_return_a_count(answer):
    register_formula(torch.ops.cheapgrad_tests.mix, lambda x, weight, out: answer)
    with pytest.raises(FormulaError, match=f"cheapgrad_tests::mix must return a whole number .* returned {answer}"):
        cheapgrad.scan(Mixes(), torch.randn(6, 8))


def test_formula_that_raises_names_its_operation():
    register_formula(torch.ops.cheapgrad_tests.mix, lambda x, out: 1)
    with pytest.raises(FormulaError, match="the formula of cheapgrad_tests::mix raised TypeError"):
        cheapgrad.scan(Mixes(), torch.randn(6, 8))


def test_operations_that_only_move_are_not_listed():
    class Moves(nn.Module):
        def forward(self, x):
            return torch.cat([x.T.contiguous().view(-1), x.flatten().flip(0)])[::2].clone()

    assert cheapgrad.scan(Moves(), torch.randn(6, 8, requires_grad=True)).uncounted == ("aten::add",)
