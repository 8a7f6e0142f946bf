"""What rules cannot reach is listed by name, with the bytes it holds and the reason; biased codes are refused."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional

from cheapgrad import Rule, approximate, linear_cross_entropy
from cheapgrad.convert.uncovered import is_listed, why_uncovered
from cheapgrad.cost import measure_held_bytes
from cheapgrad.errors import ConversionError, NoMatchError
from cheapgrad.sketch import StochasticRounding

WIDTH, ROWS = 64, 32
RULE = Rule(stored=StochasticRounding(4))


class Between(nn.Module):
    """A function between two layers, after which nothing needs a gradient but the layers' own."""

    def __init__(self, function):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.function = function

    def forward(self, x):
        return self.second(self.function(self.first(x)))


NOT_REACHED = {
    "logsigmoid": (functional.logsigmoid, "torch.nn.LogSigmoid in its place is reached"),
    "threshold": (lambda x: functional.threshold(x, 0.1, 2.0), "torch.nn.Threshold in its place is reached"),
    "softsign": (functional.softsign, ""),
    "tanhshrink": (functional.tanhshrink, ""),
    "elu_": (functional.elu_, ""),
    "celu_": (functional.celu_, ""),
    "selu_": (functional.selu_, ""),
    "dropout": (lambda x: functional.dropout(x, 0.5), ""),
    "layer_norm": (lambda x: functional.layer_norm(x, (WIDTH,)), "torch.nn.LayerNorm in its place is reached"),
    "softmax": (lambda x: x.softmax(-1), "refused: its backward pass multiplies its stored output with itself"),
    "log_softmax": (lambda x: x.log_softmax(-1), "refused: its backward pass takes the exponential"),
    "glu": (lambda x: functional.glu(torch.cat([x, x], -1)), "refused: its backward pass multiplies a sigmoid"),
    "written out": (lambda x: x * torch.sigmoid(1.5 * x), ""),
    "weighted elu": (lambda x: torch.ops.aten.elu(x, 1.0, 2.0, 3.0), "torch.nn.ELU in its place is reached"),
}


def held_bytes(model, x):
    return measure_held_bytes(lambda: model(x), exclude=[model, x]).total_bytes


@pytest.mark.parametrize("name", NOT_REACHED)
def test_functions_that_are_not_reached_are_listed_with_their_bytes(name):
    function, remedy = NOT_REACHED[name]
    model, x = Between(function), torch.randn(ROWS, WIDTH, requires_grad=True)
    handle = approximate(model, RULE, skip_small=False)
    held = handle.uncovered(x)
    assert held
    assert {each.module for each in held} == {""}
    assert {each.kind for each in held} == {"Between"}
    assert [each.held_bytes for each in held] == sorted((each.held_bytes for each in held), reverse=True)
    # Of the whole network, what is not listed are the codes of the two layers.
    codes = sum(row.saved_bytes for row in handle.rows)
    assert sum(each.held_bytes for each in held) + codes == held_bytes(model, x)
    assert all(each.reason.startswith(("called inside the forward of Between", "refused: ")) for each in held)
    assert remedy in held[0].reason


LISTED = {
    "Softmax": (nn.Softmax(-1), "refused: its backward pass multiplies its stored output with itself"),
    "LogSoftmax": (nn.LogSoftmax(-1), "refused: its backward pass takes the exponential"),
    "Softmin": (nn.Softmin(-1), "refused"),
    "LocalResponseNorm": (nn.LocalResponseNorm(2), "refused: its backward pass takes powers"),
    "RReLU": (nn.RReLU(), "unsupported: no sketched operation for RReLU"),
    "several axes": (nn.LayerNorm((2, 4)), "unsupported: LayerNorm normalises over several axes"),
    "AdaptiveMaxPool2d": (nn.AdaptiveMaxPool2d(2), "unsupported: no sketched operation for AdaptiveMaxPool2d"),
    "Dropout2d": (nn.Dropout2d(0.5), "unsupported: no sketched operation for Dropout2d"),
    "indices": (nn.MaxPool2d(2, return_indices=True), "unsupported: the indices that it returns are held anyway"),
}


@pytest.mark.parametrize("name", LISTED)
def test_modules_that_cannot_be_covered_are_listed_by_name_with_their_bytes(name):
    module, reason = LISTED[name]

    class First(nn.Module):
        """Hands on the output alone."""

        def forward(self, output):
            return output[0] if isinstance(output, tuple) else output

    model = nn.Sequential(nn.Conv2d(2, 4, 1), module, First())
    x = torch.randn(3, 2, 2, 4, requires_grad=True)
    handle = approximate(model, RULE, skip_small=False)
    row = next(row for row in handle.rows if row.name == "1")
    assert (row.status, row.kind) == ("skipped", type(module).__name__)
    assert reason in row.remark
    assert reason.split(":")[0] in " ".join(str(handle).split())
    held = handle.uncovered(x)
    assert {(each.module, each.kind) for each in held} == {("1", type(module).__name__)}
    assert all(each.reason == row.remark for each in held)
    codes = next(row.saved_bytes for row in handle.rows if row.name == "0")
    assert sum(each.held_bytes for each in held) == held_bytes(model, x) - codes > 0


@pytest.mark.parametrize("module", [nn.Softmax(-1), nn.GLU(), nn.LPPool2d(2, 2), nn.LocalResponseNorm(2)], ids=repr)
def test_a_code_of_what_backward_is_not_linear_in_is_refused_with_the_reason(module):
    model = nn.Sequential(nn.Linear(8, 8), module)
    with pytest.raises(NoMatchError, match=r"refused: its backward pass .* would give a biased gradient"):
        approximate(model, Rule("1", stored=StochasticRounding(4)))


def test_such_a_code_would_be_biased():
    """The reason is true: a softmax's backward pass on decoded outputs has another mean."""
    torch.manual_seed(0)
    y, grad = torch.randn(1, 16, dtype=torch.float64).mul(2).softmax(-1), torch.randn(1, 16, dtype=torch.float64)

    def backward(stored):
        return stored * (grad - (stored * grad).sum(-1, keepdim=True))

    # Two values per entry with the right mean: up or down by half.
    signs = torch.randint(0, 2, (200_000, 16), dtype=torch.float64) * 2 - 1
    drawn = backward(y * (1 + 0.5 * signs))
    error = drawn.std(0) / 200_000**0.5
    assert ((drawn.mean(0) - backward(y)[0]).abs() > 6 * error).any()


IN_PLACE = {
    "ReLU": nn.ReLU(inplace=True),
    "LeakyReLU": nn.LeakyReLU(inplace=True),
    "SiLU": nn.SiLU(inplace=True),
    "Hardtanh": nn.Hardtanh(inplace=True),
    "ELU": nn.ELU(inplace=True),
    "Threshold": nn.Threshold(0.1, 2.0, inplace=True),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_activations_that_overwrite_a_view_are_listed_with_their_bytes(name):
    model = nn.Sequential(nn.Conv2d(2, 8, 1), nn.Flatten(2), copy.deepcopy(IN_PLACE[name]))
    x = torch.randn(4, 2, 8, 8, requires_grad=True)
    handle = approximate(model, RULE, skip_small=False)
    (held,) = handle.uncovered(x)
    assert (held.module, held.kind) == ("2", f"Sketched{name}")
    assert held.reason.startswith("in place over a view")
    assert held.reason.endswith(f"{name}(inplace=False) is reached")
    codes = handle.rows[0].saved_bytes
    assert held.held_bytes == held_bytes(model, x) - codes == 4 * 8 * 64 * 4
    del model[1]
    assert handle.uncovered(x) == ()


@pytest.mark.parametrize("name", IN_PLACE)
def test_activations_that_overwrite_the_output_of_a_linear_layer_hold_their_codes_alone(name):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), copy.deepcopy(IN_PLACE[name]), nn.Linear(WIDTH, WIDTH))
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    handle = approximate(model, RULE, skip_small=False)
    assert handle.uncovered(x) == ()
    assert held_bytes(model, x) == sum(row.saved_bytes for row in handle.rows)


def test_layers_in_eval_mode_are_listed():
    model = nn.Sequential(nn.Conv2d(2, 8, 1), nn.GELU())
    x = torch.randn(4, 2, 8, 8, requires_grad=True)
    handle = approximate(model, RULE, skip_small=False)
    model[1].eval()
    (held,) = handle.uncovered(x)
    assert held.reason == "GELU is in eval() mode, where PyTorch's own code runs"
    assert held.held_bytes == 4 * 8 * 64 * 4


def test_what_an_attention_holds_without_its_kernel_is_listed_too():
    # With dropout PyTorch multiplies matrices itself on a CPU.
    model = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.1, batch_first=True)
    held = approximate(model, RULE, skip_small=False).uncovered(torch.randn(2, 8, WIDTH, requires_grad=True))
    of_attention = [each for each in held if each.module == "self_attn"]
    assert "aten::bmm" in {each.operation for each in of_attention}
    assert all("a softmax is not linear in them" in each.reason for each in of_attention)


def test_what_an_attention_holds_is_listed_with_the_reason():
    model = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)
    x = torch.randn(2, 8, WIDTH, requires_grad=True)
    handle = approximate(model, RULE, skip_small=False)
    held = handle.uncovered(x)
    (attention,) = [each for each in held if "dot_product" in each.operation]
    assert attention.module == "self_attn"
    assert re.search("a softmax is not linear in them", attention.reason)
    # Queries, keys, values and the output, and a number per head and token.
    assert attention.held_bytes >= 4 * x.numel() * 4


def test_layers_no_rule_matches_and_losses_are_listed():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 8))
    x, labels = torch.randn(ROWS, WIDTH), torch.randint(0, 8, (ROWS,))
    handle = approximate(model, Rule("0", stored=StochasticRounding(4)), skip_small=False)
    held = handle.uncovered(x, loss=lambda scores: functional.cross_entropy(scores, labels))
    assert {each.module for each in held} == {"1", "2", "(outside)"}
    assert all("no rule matches this module" in each.reason for each in held if each.module in "12")
    assert any("linear_cross_entropy holds less" in each.reason for each in held if each.module == "(outside)")


def test_functions_of_this_library_are_not_listed():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8, bias=False)

        def forward(self, x, labels):
            return linear_cross_entropy(self.body(x), self.head.weight, labels)

    model = Model()
    handle = approximate(model, Rule("body", stored=StochasticRounding(4)), skip_small=False)
    held = handle.uncovered(torch.randn(ROWS, WIDTH), torch.randint(0, 8, (ROWS,)))
    assert all("Gradients" not in each.operation for each in held)


def test_the_comparison_of_costs_names_the_largest():
    model = Between(functional.logsigmoid)
    handle = approximate(model, RULE, skip_small=False)
    remark = handle.measure_cost(torch.randn(ROWS, WIDTH)).remarks[-1]
    assert re.search(r"held by what no rule reaches: LogSigmoid in \(model\): 16\.00 KiB \(called inside", remark)
    assert "handle.uncovered(batch) lists all" in remark
    (held,) = handle.uncovered(torch.randn(ROWS, WIDTH))
    assert held.to_dict()["held_bytes"] == 16384
    handle.revert()
    with pytest.raises(ConversionError, match="reverted already"):
        handle.uncovered(torch.randn(ROWS, WIDTH))


def test_what_holds_nothing_is_not_listed():
    for module in (nn.Identity(), nn.Flatten(), nn.ZeroPad2d(1), nn.Upsample(scale_factor=2), nn.PixelShuffle(2)):
        assert not is_listed(module)

    class Mine(nn.GELU):
        def forward(self, x):
            return x

    assert why_uncovered(Mine()) == "unsupported: Mine overrides the forward of GELU"
