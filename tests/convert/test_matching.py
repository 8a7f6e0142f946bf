"""Which layers a rule converts, and what the others are told."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from cheapgrad import Rule, approximate
from cheapgrad.errors import ConversionError, NoEffectWarning, NoMatchError
from cheapgrad.sketch import ColumnSample, ExampleSample, LowRank, RowSample, StochasticRounding
from tests.convert.models import HALF, KeepsForward, Network, OverridesForward, convert, gradients

LAYERS = ["blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2", "head"]
WITH_NORM = [*LAYERS[:4], "norm", "head"]


def converted(handle):
    return [row.name for row in handle.rows if row.status == "converted"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*", WITH_NORM),
        ("blocks.*", LAYERS[:4]),
        ("*.fc1", ["blocks.0.fc1", "blocks.1.fc1"]),
        ("blocks.[1].fc?", ["blocks.1.fc1", "blocks.1.fc2"]),
        ("head", ["head"]),
        (nn.Linear, LAYERS),
        (lambda name, module: getattr(module, "out_features", 0) == 10, ["head"]),
        (lambda name, module: name.startswith("blocks.1"), LAYERS[2:4]),
    ],
)
def test_patterns_choose_layers(pattern, names):
    assert converted(convert(Network(), pattern)) == names


def test_later_rules_win():
    model = Network()
    handle = approximate(
        model,
        Rule(cotangent=RowSample(0.5)),
        Rule("*.fc2", stored=StochasticRounding(4)),
        Rule("blocks.1.fc2", cotangent=ColumnSample(0.25)),
        skip_small=False,
    )
    fields = {row.name: (row.stored, row.cotangent) for row in handle.rows if row.status == "converted"}
    assert fields == {
        "blocks.0.fc1": (None, "RowSample(keep=0.5)"),
        "blocks.0.fc2": ("StochasticRounding(bits=4)", None),
        "blocks.1.fc1": (None, "RowSample(keep=0.5)"),
        "blocks.1.fc2": (None, "ColumnSample(keep=0.25)"),
        "norm": (None, "RowSample(keep=0.5)"),
        "head": (None, "RowSample(keep=0.5)"),
    }


def test_a_later_rule_of_full_budget_takes_a_layer_out():
    handle = approximate(Network(), Rule(cotangent=HALF), Rule("head", cotangent=RowSample(1.0)), skip_small=False)
    assert converted(handle) == [*LAYERS[:4], "norm"]
    assert {row.name: row.remark for row in handle.rows}["head"] == "cotangent: full budget, stock code runs"


def test_rows_list_every_matched_layer_in_order():
    handle = convert(Network())
    assert [row.name for row in handle.rows] == [*LAYERS[:4], "norm", "head"]


def test_the_root_module_is_a_layer_too():
    layer = nn.Linear(8, 8)
    handle = convert(layer)
    assert converted(handle) == [""]
    assert isinstance(layer, nn.Linear)


def remark_of(model, name, *, skip_small=False, **strategies):
    with pytest.warns(NoEffectWarning):
        handle = approximate(model, Rule(name, **strategies or {"cotangent": HALF}), skip_small=skip_small)
    (row,) = handle.rows
    assert row.status == "skipped"
    return row.remark


def test_skip_reason_frozen():
    model = nn.Sequential(nn.Linear(64, 64).requires_grad_(False))
    assert remark_of(model, "0", stored=StochasticRounding(4)) == ("frozen: PyTorch keeps no input of a frozen layer")


def test_a_frozen_layer_may_still_sketch_the_cotangent_it_passes_on():
    model = nn.Sequential(nn.Linear(64, 64).requires_grad_(False))
    assert converted(approximate(model, Rule(stored=StochasticRounding(4), cotangent=HALF), skip_small=False)) == ["0"]
    assert model[0]._cheapgrad.plan.stored is None


@pytest.mark.parametrize(
    ("layer", "strategies", "text"),
    [
        (nn.Linear(16, 10), {"cotangent": HALF}, "too small to pay: 160 weights, under 16384 (skip_small=False"),
        (nn.Linear(16, 8), {"stored": StochasticRounding(4)}, "too small to pay: 128 weights, under 16384 (skip_small"),
    ],
)
def test_skip_reason_too_small(layer, strategies, text):
    assert text in remark_of(nn.Sequential(layer), "0", skip_small=True, **strategies)
    assert converted(approximate(nn.Sequential(layer), Rule(**strategies), skip_small=False)) == ["0"]


def test_both_moments_are_judged_apart():
    # 288 weights: too few for a cotangent sketch, but every pixel of a picture is stored.
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    handle = approximate(model, Rule(stored=StochasticRounding(4), cotangent=ExampleSample(0.5)))
    (row,) = handle.rows
    assert (row.status, row.stored, row.cotangent) == ("converted", "StochasticRounding(bits=4)", None)
    assert "too small to pay: 288 weights, under 1024" in row.remark


def test_strategies_that_save_no_time_in_a_convolution_are_listed():
    model = nn.Sequential(nn.Conv2d(64, 64, 3))
    with pytest.warns(NoEffectWarning, match="no time saved: RowSample of the cotangent is no faster than a native"):
        handle = approximate(model, Rule(cotangent=HALF))
    assert handle.rows[0].status == "skipped"
    assert converted(approximate(model, Rule(cotangent=HALF), skip_small=False)) == ["0"]


def test_a_convolution_with_another_inner_forward_is_left_alone():
    class Standardised(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, weight * 2, bias)

    with pytest.raises(NoMatchError, match="matches only layers that cannot be converted: Standardised"):
        approximate(nn.Sequential(Standardised(64, 64, 3)), Rule(stored=StochasticRounding(4)))


def test_a_rule_that_later_ones_hide_is_a_warning():
    model = nn.Sequential(nn.Linear(256, 256))
    with pytest.warns(NoEffectWarning, match="the rule for '0' has no effect: later rules win"):
        approximate(model, Rule("0", stored=StochasticRounding(4)), Rule(cotangent=HALF))


def test_a_class_that_refuses_leaves_everything_as_it_was():
    class Refusing(nn.Linear):
        def __init_subclass__(cls):
            raise TypeError("final")

    model = nn.Sequential(nn.Linear(256, 256), Refusing(256, 256))
    with pytest.raises(ConversionError, match=r"refuses to be subclassed \(final\); the model is unchanged"):
        approximate(model, Rule(cotangent=HALF))
    assert [type(layer) for layer in model] == [nn.Linear, Refusing]
    assert not any("_cheapgrad" in layer.__dict__ for layer in model)


def test_skip_reason_no_operation():
    handle = convert(nn.Sequential(nn.Bilinear(8, 8, 8), nn.Linear(8, 8)))
    assert handle.rows[0].remark == "unsupported: no sketched operation for Bilinear"


def test_a_norm_has_no_rows_to_share_where_no_layer_draws():
    with pytest.warns(NoEffectWarning, match="no layer that draws rows is converted, so there are none to share"):
        approximate(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), Rule(cotangent=HALF))


def test_a_strategy_without_meaning_for_a_norm_is_listed():
    handle = convert(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), strategy=ColumnSample(0.5))
    assert converted(handle) == ["1"]
    assert handle.rows[0].remark.startswith("cotangent: ColumnSample has no meaning for LayerNorm")


def test_skip_reason_overridden_forward():
    handle = convert(nn.Sequential(OverridesForward(8, 8), KeepsForward(8, 8)))
    assert converted(handle) == ["1"]
    assert handle.rows[0].remark == "unsupported: OverridesForward overrides the forward of Linear"


def test_skip_reason_output_projection_of_attention():
    model = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    handle = convert(model)
    assert converted(handle) == ["self_attn", "linear1", "linear2", "norm1", "norm2"]
    remarks = {row.name: row.remark for row in handle.rows}
    assert remarks["self_attn.out_proj"] == (
        "unsupported: nn.MultiheadAttention reads this layer's weight without calling it; convert the attention"
    )
    # The fast path of evaluation reads the weights of the layers itself.
    model(torch.randn(2, 3, 32)).sum().backward()
    model.eval()(torch.randn(2, 3, 32))


def with_own_forward():
    layer = nn.Linear(8, 8)
    layer.forward = lambda input: input
    return layer


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (with_own_forward, "this instance carries a forward of its own"),
        (lambda: nn.LazyLinear(8), "its weight has no shape yet; run one batch, then convert"),
        (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), "its weight is parametrized; convert first"),
        (lambda: nn.Linear(8, 8, dtype=torch.complex64), "weights of type torch.complex64"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_skip_reason_unusual_weight(build, text):
    assert text in remark_of(nn.Sequential(build()), "0")


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_skip_reason_no_entries():
    assert "a weight of shape (0, 8) has no entries" in remark_of(nn.Sequential(nn.Linear(8, 0)), "0")


def test_a_lazy_layer_converts_after_its_first_batch():
    model = nn.Sequential(nn.LazyLinear(8))
    model(torch.randn(2, 4))
    assert converted(convert(model)) == ["0"]


def test_a_pruned_layer_converts():
    layer = prune.l1_unstructured(nn.Linear(8, 8), "weight", amount=0.5)
    assert converted(convert(nn.Sequential(layer))) == ["0"]
    layer(torch.randn(4, 8)).sum().backward()
    assert (layer.weight_orig.grad == 0)[layer.weight_mask == 0].all()


def test_a_parametrization_may_follow_and_must_leave_before_revert():
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer)
    handle = convert(model)
    parametrizations.weight_norm(layer)
    model(torch.randn(4, 8)).sum().backward()
    with pytest.raises(RuntimeError, match=r"layer '0' is a ParametrizedSketchedLinear now, not the SketchedLinear"):
        handle.revert()
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    handle.revert()
    assert type(layer) is nn.Linear


def test_a_module_used_under_two_names_answers_to_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(8, 8)
            self.decoder = self.encoder

        def forward(self, x):
            return self.decoder(torch.relu(self.encoder(x)))

    for pattern in ("encoder", "decoder", "*"):
        model = Twice()
        handle = convert(model, pattern)
        assert converted(handle) == ["encoder"]
        assert model.encoder is model.decoder
        assert len(gradients(model, torch.randn(16, 8))) == 3
        assert handle.rows[0].saved_bytes == 16 * 8 * 4
        handle.revert()
        assert type(model.decoder) is nn.Linear


def test_a_module_used_twice_draws_twice_and_stays_unbiased():
    layer = nn.Linear(16, 16, bias=False)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x = torch.randn(32, 16)
    exact = gradients(model, x)[1]
    convert(model)
    draws = torch.stack([gradients(model, x, seed)[1] for seed in range(400)])
    along = (draws * exact).sum((1, 2)) / exact.square().sum()
    assert abs(along.mean() - 1) < 5 * along.std() / 20
    assert along.std() / 20 < 0.02


def test_tied_weights_are_remarked():
    model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12))
    model[2].weight = model[0].weight
    handle = convert(model, "1", "2")
    remarks = {row.name: row.remark for row in handle.rows}
    assert remarks == {"1": "", "2": "tied with 0: independent draws, the sum stays unbiased"}
    model(torch.tensor([1, 2, 3])).sum().backward()
    assert model[0].weight.grad is model[2].weight.grad


def test_converting_twice_is_a_named_error_and_disjoint_patterns_work():
    model = Network()
    first = convert(model, "blocks.0.*")
    with pytest.raises(RuntimeError, match=r"layer 'blocks.0.fc1' is converted already; call handle.revert\(\) first"):
        convert(model)
    second = convert(model, "blocks.1.*", strategy=LowRank(4))
    assert converted(first) == LAYERS[:2]
    assert converted(second) == LAYERS[2:4]
    first.revert()
    assert type(model.blocks[0].fc1) is nn.Linear
    assert type(model.blocks[1].fc1).__name__ == "SketchedLinear"
    with second.exact():
        gradients(model, torch.randn(4, 32))
    second.revert()
    assert {type(module) for module in model.modules() if isinstance(module, nn.Linear)} == {nn.Linear}


def test_converting_again_after_revert_works():
    model = Network()
    convert(model).revert()
    assert converted(convert(model)) == WITH_NORM


def test_nothing_converted_is_a_warning_with_reasons():
    with pytest.warns(NoEffectWarning, match=r"converted nothing: 0: too small to pay: 64 weights, under 16384"):
        approximate(nn.Sequential(nn.Linear(8, 8)), Rule(cotangent=HALF))
    with pytest.warns(NoEffectWarning, match="full budget"):
        approximate(nn.Sequential(nn.Linear(8, 8)), Rule(cotangent=RowSample(1.0)))
