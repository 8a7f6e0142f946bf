"""Norms over images: forward bit for bit, unbiased gradients of the stated variance, bytes as predicted."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from cheapgrad import Rule, approximate
from cheapgrad.cost import measure_held_bytes
from cheapgrad.errors import ForwardModeError, NoEffectWarning, SecondDerivativeError
from cheapgrad.ops import _norm_codes, norms
from cheapgrad.ops.norms import Normalisation, norm_variance, sketched_norm
from cheapgrad.sketch import LowRank, RowSample, StochasticRounding, fusing, random
from tests.ops.convolution_cases import assert_unbiased
from tests.oracles import rounding

FOUR_BITS = StochasticRounding(4)
CHANNELS = 4
MODULES = {
    "rows": (lambda: nn.BatchNorm1d(CHANNELS), (6, 4)),
    "sequence": (lambda: nn.BatchNorm1d(CHANNELS), (6, 4, 5)),
    "images": (lambda: nn.BatchNorm2d(CHANNELS), (3, 4, 8, 8)),
    "cumulative average": (lambda: nn.BatchNorm2d(CHANNELS, momentum=None), (3, 4, 8, 8)),
    "no running statistics": (lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False), (3, 4, 8, 8)),
    "no parameters": (lambda: nn.BatchNorm2d(CHANNELS, affine=False, eps=0.1), (3, 4, 7, 9)),
    "volumes": (lambda: nn.BatchNorm3d(CHANNELS), (2, 4, 2, 3, 4)),
    "groups": (lambda: nn.GroupNorm(2, CHANNELS), (3, 4, 8, 8)),
    "groups of rows": (lambda: nn.GroupNorm(2, CHANNELS), (3, 4)),
    "groups, no parameters": (lambda: nn.GroupNorm(2, CHANNELS, affine=False), (3, 4, 5)),
    "instance, sequence": (lambda: nn.InstanceNorm1d(CHANNELS), (3, 4, 9)),
    "instance, tracked": (lambda: nn.InstanceNorm2d(CHANNELS, affine=True, track_running_stats=True), (3, 4, 9, 3)),
    "instance, one image": (lambda: nn.InstanceNorm2d(CHANNELS, affine=True), (4, 9, 3)),
    "instance, volumes": (lambda: nn.InstanceNorm3d(CHANNELS), (3, 4, 2, 3, 4)),
}
every_module = pytest.mark.parametrize("name", MODULES)


def pair(name, dtype=torch.float64, bits=4):
    """Return the stock module with parameters of its own, its converted copy, and an input."""
    build, shape = MODULES[name]
    stock = build()
    for parameter in stock.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    stock = stock.to(dtype)
    converted = copy.deepcopy(stock)
    handle = approximate(converted, Rule(stored=StochasticRounding(bits)))
    return stock, converted, handle, (torch.randn(shape) * torch.rand(shape) * 3 + 1).to(dtype)


def gradients(module, x, grad):
    leaf = x.clone().requires_grad_()
    leaves = [leaf, *module.parameters()]
    return torch.autograd.grad(module(leaf), leaves, grad)


@every_module
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_forward_and_running_statistics_are_pytorchs(name, dtype):
    stock, converted, _, x = pair(name, dtype)
    for step in range(3):
        expected, output = stock(x + step), converted((x + step).requires_grad_())
        assert output.requires_grad
        assert torch.equal(output, expected)
    for key, value in stock.state_dict().items():
        assert torch.equal(converted.state_dict()[key], value), key
    assert torch.equal(converted.eval()(x), stock.eval()(x))


def test_a_strided_input_is_normalised_alike():
    stock, converted, _, x = pair("images")
    strided = x.contiguous(memory_format=torch.channels_last)
    output = converted(strided.requires_grad_())
    assert torch.equal(output, stock(strided))
    assert output.is_contiguous(memory_format=torch.channels_last)
    grad, drawn = torch.randn_like(x), []
    for each in (x, strided.detach()):
        torch.manual_seed(1)
        drawn.append(gradients(converted, each, grad))
    for one, two in zip(*drawn, strict=True):
        torch.testing.assert_close(one, two)


def test_what_the_stock_module_refuses_is_refused_alike():
    _, converted, _, _ = pair("images")
    with pytest.raises(ValueError, match="expected 4D input"):
        converted(torch.randn(3, 4, dtype=torch.float64, requires_grad=True))
    _, converted, _, _ = pair("rows")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        converted(torch.randn(1, 4, dtype=torch.float64, requires_grad=True))


# Sets of entries that share a mean, small enough for all outcomes of both codes.
SMALL = {
    "batch": (Normalisation(None, 1e-3), (2, 1, 2)),
    "batch of rows": (Normalisation(None, 1e-3), (3, 1)),
    "group": (Normalisation(1, 1e-3), (1, 2, 2)),
    "instance": (Normalisation(1, 1e-3), (1, 1, 5)),
}


def plain_norm(x, weight, norm):
    if norm.groups is None:
        return nn.functional.batch_norm(x, None, None, weight, None, True, 0.0, norm.eps)
    return nn.functional.group_norm(x, norm.groups, weight, None, norm.eps)


def sketched(x, weight, norm, codec):
    def stock(value):
        return plain_norm(value, weight, norm), None, None

    return sketched_norm(x, weight, None, norm, codec, stock)


def outcomes_of(values, codec):
    """Return draws ``[M, rows]`` that lead to every outcome of a code with a draw for each row, and their chances."""
    scales = codec.store(norms_operands(values))[1].double()
    per_row = []
    columns = values.shape[1]
    shifts = np.array(rounding.mirrored_digits(columns))
    low, step = (scale.repeat_interleave(codec.group)[: values.numel()].view(values.shape) for scale in scales.T)
    _, _, up = rounding.lower_upper_chance(values.numpy(), low.numpy(), step.numpy())
    for row in up:
        per_row.append([(middle, length) for middle, length, _ in rounding.outcomes_of_a_draw(row, shifts)])
    combined = list(itertools.product(*per_row))
    return [[m for m, _ in each] for each in combined], np.array([np.prod([c for _, c in each]) for each in combined])


def norms_operands(values):
    return _norm_codes.Operands(_norm_codes.Moment.STORED, _norm_codes.DenseMatrix(values))


def enumerate_gradients(case, codec, monkeypatch, *, same=False):
    """Return chances and gradients (dx, dweight) of all pairs of outcomes; of equal outcomes only, if `same`."""
    norm, shape = SMALL[case]
    generator = torch.Generator().manual_seed(3)
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.rand(shape[1], generator=generator, dtype=torch.float64) + 0.5
    mean, rstd = norm.statistics(x)
    rows = (*shape[:2], 1)
    x_hat = (x.view(*shape[:2], -1) - norm.per_channel(mean, shape).view(rows)) * norm.per_channel(rstd, shape).view(
        rows
    )
    matrix = x_hat.reshape(_norm_codes.matrix_sizes(shape))
    firsts = outcomes_of(matrix, codec)
    seconds = firsts if same else outcomes_of(matrix, norms.second_codec(codec))
    waiting = []

    def fed(like, asked, *, double=True, generator=None):
        return torch.tensor(waiting.pop(0), dtype=torch.float32).reshape(tuple(asked))

    monkeypatch.setattr(random, "uniform", fed)
    chances, drawn = [], []
    pairs = itertools.product(range(len(firsts[0])), range(len(seconds[0])))
    for one, two in ((k, k) for k in range(len(firsts[0]))) if same else pairs:
        waiting[:] = [firsts[0][one], seconds[0][two]]
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        drawn.append(torch.autograd.grad(sketched(*leaves, norm, codec), leaves, grad))
        chances.append(firsts[1][one] * (1 if same else seconds[1][two]))
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    exact = torch.autograd.grad(plain_norm(*leaves, norm), leaves, grad)
    return np.array(chances), drawn, exact, norm_variance(x, weight, grad, norm, codec)


def assert_law(chances, drawn, exact, variance):
    assert chances.sum() == pytest.approx(1, rel=1e-9)
    for position, predicted in enumerate((variance.input, variance.weight)):
        errors = torch.stack([each[position] - exact[position] for each in drawn]).flatten(1).numpy()
        np.testing.assert_allclose(chances @ errors, 0, atol=3e-6, err_msg="biased")
        np.testing.assert_allclose(chances @ (errors**2).sum(1), float(predicted), rtol=1e-4, err_msg="variance")


@pytest.mark.parametrize(("case", "bits"), [*((case, 2) for case in SMALL), ("group", 4)])
def test_every_pair_of_outcomes_makes_up_gradient_and_stated_variance(case, bits, monkeypatch):
    outcomes = enumerate_gradients(case, StochasticRounding(bits, group=8), monkeypatch)
    assert len(outcomes[0]) > 50
    assert_law(*outcomes)


@pytest.mark.parametrize("case", ["batch", "group"])
def test_one_code_used_twice_is_caught(case, monkeypatch):
    monkeypatch.setattr(_norm_codes, "second_codec", lambda codec: codec)
    with pytest.raises(AssertionError, match="biased"):
        assert_law(*enumerate_gradients(case, StochasticRounding(2, group=8), monkeypatch, same=True))


def test_a_wrong_variance_is_caught(monkeypatch):
    chances, drawn, exact, variance = enumerate_gradients("instance", StochasticRounding(2, group=8), monkeypatch)
    with pytest.raises(AssertionError, match="variance"):
        assert_law(chances, drawn, exact, norms.Variance(variance.input * 1.01, variance.weight))


@pytest.mark.parametrize("name", ["rows", "images", "groups"])
def test_real_draws_are_unbiased_and_vary_as_stated(name):
    stock, converted, _, x = pair(name, bits=2)
    grad = torch.randn_like(x)
    exact = gradients(stock, x, grad)
    drawn = [gradients(converted, x, grad) for _ in range(400)]
    law = norm_variance(x, stock.weight, grad, norms_of(stock), StochasticRounding(2))
    for position, predicted in enumerate((law.input, law.weight)[: len(exact)]):
        stacked = torch.stack([each[position] for each in drawn])
        assert_unbiased(stacked, exact[position], largest_relative_error=0.05)
        if position == 0:
            # Enough for a tenth: the enumeration is exact.
            measured = (stacked - exact[0]).flatten(1).square().sum(1).mean().item()
            assert measured == pytest.approx(float(predicted), rel=0.1)


def norms_of(module):
    if isinstance(module, nn.GroupNorm):
        return Normalisation(module.num_groups, module.eps)
    return Normalisation(CHANNELS if isinstance(module, nn.InstanceNorm1d) else None, module.eps)


def test_predictions_are_the_law():
    stock, converted, handle, x = pair("images", bits=2)
    grad = torch.randn_like(x)
    leaf = x.requires_grad_()
    handle.predict(lambda: (converted(leaf) * grad).sum())
    law = norm_variance(x, stock.weight, grad, norms_of(stock), StochasticRounding(2))
    (row,) = handle.rows
    assert row.input_variance == pytest.approx(float(law.input))
    assert row.weight_variance == pytest.approx(float(law.weight))
    assert row.weight_norm_squared == pytest.approx(float(gradients(stock, x.detach(), grad)[1].square().sum()))


@every_module
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wants_input", [True, False])
def test_bytes_held_are_those_predicted(name, dtype, wants_input):
    stock, converted, handle, x = pair(name, dtype)
    if not wants_input and not list(stock.parameters()):
        return
    x.requires_grad_(wants_input)
    held = [measure_held_bytes(lambda model=model: model(x), exclude=[model]) for model in (stock, converted)]
    (row,) = handle.rows
    assert [row.exact_saved_bytes, row.saved_bytes] == [each.total_bytes for each in held]


def test_a_block_of_convolution_norm_and_relu_holds_codes_and_bits_only():
    block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
    approximate(block, Rule(stored=FOUR_BITS))
    x = torch.randn(4, 8, 16, 16)
    entries = x.numel()
    held = measure_held_bytes(lambda: block(x), exclude=[block, x]).total_bytes
    four_bits, two_bits, scale = entries // 2, entries // 4, entries // 64 * 4
    assert held == 3 * (four_bits + scale) + (two_bits + scale) + entries // 8 + 8 * 4


@pytest.mark.parametrize("shape", [(40, 4, 50), (9, 3, 128), (40, 3, 7)])
def test_working_in_pieces_changes_no_mean(shape, monkeypatch):
    """Draws come in another order: what is encoded, and the mean of what is decoded, is the same."""
    x, grad = torch.randn(shape), torch.randn(shape)
    results = []
    for piece in (1 << 17, 500):
        monkeypatch.setattr(fusing, "_PIECE", piece)
        monkeypatch.setattr(random, "uniform", lambda like, shape, **options: torch.full(tuple(shape), 0.3))
        leaf = x.clone().requires_grad_()
        weight = torch.ones(shape[1], requires_grad=True)
        output = sketched(leaf, weight, Normalisation(None, 1e-5), FOUR_BITS)
        results.append(torch.autograd.grad(output, (leaf, weight), grad))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


def test_a_nan_reaches_the_gradients_of_its_channel():
    _, converted, _, x = pair("images", torch.float32)
    x[1, 2, 3, 4] = torch.nan
    of_input, of_weight, _ = gradients(converted, x, torch.randn_like(x))
    assert of_input[:, 2].isnan().all()
    assert of_weight[2].isnan()
    assert of_input[:, [0, 1, 3]].isfinite().all()


def test_the_output_may_be_overwritten():
    """As a ReLU in place does."""
    stock, converted, _, x = pair("images")
    output = converted(x.requires_grad_()).relu_()
    assert torch.equal(output, stock(x).relu())
    torch.autograd.grad(output.sum(), x)


def test_second_derivatives_and_forward_mode_are_refused():
    _, converted, handle, x = pair("images")
    (first,) = torch.autograd.grad(converted(x.requires_grad_()).sum(), x, create_graph=True)
    with pytest.raises(SecondDerivativeError, match="through a sketched norm"):
        first.sum().backward()
    with forward_ad.dual_level(), pytest.raises(ForwardModeError, match="asked of a sketched norm"):
        converted(forward_ad.make_dual(x, torch.ones_like(x)))
    with handle.exact():
        (first,) = torch.autograd.grad(converted(x).square().sum(), x, create_graph=True)
        first.sum().backward()


def test_strategies_without_a_meaning_are_refused_by_a_reason():
    for rule in (Rule(stored=RowSample(0.5)), Rule(stored=LowRank(2)), Rule(cotangent=RowSample(0.5))):
        with pytest.warns(NoEffectWarning, match="converted nothing"):
            handle = approximate(nn.Sequential(nn.BatchNorm2d(4)), rule)
        strategy = type(rule.stored or rule.cotangent).__name__
        assert f"{strategy} {'has no meaning for' if rule.stored else 'saves nothing in'} BatchNorm2d" in str(handle)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.SyncBatchNorm(4))
    handle = approximate(model, Rule(stored=FOUR_BITS))
    assert handle.rows[1].remark == "unsupported: no sketched operation for SyncBatchNorm"
