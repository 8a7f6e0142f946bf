"""Root mean square norms: recognised by what they compute, forward bit for bit, exact on rows, unbiased from codes."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from cheapgrad import Rule, approximate
from cheapgrad.convert.kinds import kind_of
from cheapgrad.cost import measure_held_bytes
from cheapgrad.errors import NoEffectWarning
from cheapgrad.ops.chains.rms_norm_stage import RmsForm, RmsNormStage
from cheapgrad.ops.chains.stage import KeptRows
from cheapgrad.sketch import DenseMatrix, Moment, Operands, RowSample, StochasticRounding, random
from tests.oracles import rounding


class LlamaRMSNorm(nn.Module):
    """As in the Llama family: rounded, then weighted."""

    def __init__(self, features, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(features) + 0.5)
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(dtype)


class OlmoRMSNorm(LlamaRMSNorm):
    """Weighted, then rounded."""

    def forward(self, hidden_states):
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return (self.weight * hidden_states).to(dtype)


class GemmaRMSNorm(nn.Module):
    """Weighted by one more than the weight."""

    def __init__(self, features, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(features) - 0.5)
        self.eps = eps

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        output = self._norm(x.float())
        output = output * (1.0 + self.weight.float())
        return output.type_as(x)


class TwiceRMSNorm(LlamaRMSNorm):
    """Computes something else under such a name."""

    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


class NeedyRMSNorm(LlamaRMSNorm):
    """Needs more than a weight and a smoothing term."""

    def forward(self, hidden_states):
        return super().forward(hidden_states) * self.gain


NORMS = {
    "torch": lambda: nn.RMSNorm(64),
    "torch, eps": lambda: nn.RMSNorm(64, eps=0.1, elementwise_affine=False),
    "Llama": lambda: LlamaRMSNorm(64),
    "OLMo": lambda: OlmoRMSNorm(64),
    "Gemma": lambda: GemmaRMSNorm(64),
}
every_norm = pytest.mark.parametrize("name", NORMS)


@every_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, None])
def test_forward_and_bytes(name, dtype, bits):
    stock = NORMS[name]().to(dtype)
    converted = copy.deepcopy(stock)
    x = torch.randn(3, 5, 64).to(dtype).requires_grad_()
    if bits is None:
        model = nn.Sequential(converted, nn.Linear(64, 8).to(dtype))
        approximate(model, Rule(cotangent=RowSample(0.5)), skip_small=False)
        assert torch.equal(converted(x), stock(x))
        return
    handle = approximate(converted, Rule(stored=StochasticRounding(bits)))
    assert torch.equal(converted(x), stock(x))
    held = [measure_held_bytes(lambda model=model: model(x), exclude=[model]) for model in (stock, converted)]
    (row,) = handle.rows
    assert [row.exact_saved_bytes, row.saved_bytes] == [each.total_bytes for each in held]


def test_what_only_bears_the_name_is_not_recognised():
    assert kind_of(TwiceRMSNorm) is None
    assert kind_of(NeedyRMSNorm) is None
    recognised = kind_of(LlamaRMSNorm)
    assert recognised is not None
    assert recognised.name == "RMSNorm of transformers"


def problem(features=6, rows=5):
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(rows, features, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.rand(features, generator=generator, dtype=torch.float64) + 0.5
    return x, weight, grad


def exact_gradients(x, weight, grad, eps=1e-3):
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    # By definition, and not by a function for it.
    output = leaves[0] / (leaves[0].square().mean(1, keepdim=True) + eps).sqrt() * leaves[1]
    return torch.autograd.grad(output, leaves, grad)


@pytest.mark.parametrize("kept", [None, [3, 0, 0]])
def test_gradients_on_kept_rows_are_exact(kept):
    x, weight, grad = problem()
    index = None if kept is None else torch.tensor(kept)
    rows = slice(None) if index is None else index
    stage = RmsNormStage(1e-3, 6)
    opened = stage.open(stage.record(x, (weight,), False), (weight,), KeptRows(index, 5), None)
    of_input, (of_weight,) = opened.pull_back(grad[rows], (True, True))
    exact = exact_gradients(x[rows], weight, grad[rows])
    torch.testing.assert_close(of_input, exact[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(of_weight, exact[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(opened.output(), nn.functional.rms_norm(x[rows], (6,), weight, 1e-3))


def test_an_offset_is_added_to_the_weight():
    x, weight, grad = problem()
    stage = RmsNormStage(1e-3, 6, RmsForm.OFFSET)
    opened = stage.open((x,), (weight - 1,), KeptRows(None, 5), None)
    of_input, (of_weight,) = opened.pull_back(grad, (True, True))
    for ours, exact in zip((of_input, of_weight), exact_gradients(x, weight, grad), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def enumerate_gradients(monkeypatch, *, same=False):
    """Return the chances of all pairs of outcomes of a row's two codes, and the errors of dx and dweight in each."""
    x, weight, grad = problem(rows=1)
    codec = StochasticRounding(2, group=8)
    stage = RmsNormStage(1e-3, 6, stored=codec)
    x_hat, _ = stage.normalise(x)
    scales = codec.store(Operands(Moment.STORED, DenseMatrix(x_hat)))[1].double()
    low, step = (scale.repeat_interleave(8)[:6].view(1, 6).numpy() for scale in scales.T)
    _, _, up = rounding.lower_upper_chance(x_hat.numpy(), low, step)
    outcomes = rounding.outcomes_of_a_draw(up[0], np.array(rounding.mirrored_digits(6)))
    waiting = []
    monkeypatch.setattr(
        random, "uniform", lambda like, asked, **options: torch.tensor([waiting.pop(0)]).float().reshape(tuple(asked))
    )
    chances, errors = [], []
    exact = exact_gradients(x, weight, grad)
    for one, two in itertools.product(outcomes, outcomes):
        if same and one is not two:
            continue
        waiting[:] = [one[0], two[0]]
        record = stage.record(x, (weight,), False)
        opened = stage.open(record, (weight,), KeptRows(None, 1), None)
        of_input, (of_weight,) = opened.pull_back(grad, (True, True))
        assert of_input is not None
        assert of_weight is not None
        errors.append(torch.cat([(of_input - exact[0]).flatten(), of_weight - exact[1]]).numpy())
        chances.append(one[1] * (1 if same else two[1]))
    return np.array(chances), np.stack(errors)


def test_every_pair_of_codes_makes_up_the_gradient(monkeypatch):
    chances, errors = enumerate_gradients(monkeypatch)
    assert chances.sum() == pytest.approx(1, rel=1e-9)
    np.testing.assert_allclose(chances @ errors, 0, atol=3e-6)
    assert np.abs(errors).max() > 0.1


def test_one_code_used_twice_is_caught(monkeypatch):
    chances, errors = enumerate_gradients(monkeypatch, same=True)
    assert chances.sum() == pytest.approx(1, rel=1e-9)
    assert np.abs(chances @ errors).max() > 1e-3


@every_norm
def test_a_chain_from_codes_of_the_norm_is_unbiased(name):
    model = nn.Sequential(NORMS[name](), nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 16))
    x, grad = torch.randn(8, 64), torch.randn(8, 16)

    def gradients():
        leaf = x.clone().requires_grad_()
        found = torch.autograd.grad(model(leaf), [leaf, *model.parameters()], grad)
        return torch.cat([each.flatten() for each in found]).double()

    exact = gradients()
    approximate(model, Rule(stored=StochasticRounding(4), cotangent=RowSample(0.5)), skip_small=False)
    error = torch.stack([gradients() for _ in range(200)]) - exact
    projected = error @ torch.randn(error.shape[1], 16, dtype=torch.float64)
    standard_error = projected.std(0) / 200**0.5
    assert (projected.mean(0).abs() <= 5.5 * standard_error).all()
    assert standard_error.norm() / 4 < 0.1 * exact.norm()


@pytest.mark.parametrize("build", [nn.RMSNorm, nn.LayerNorm], ids=lambda build: build.__name__)
def test_norms_over_several_axes_are_listed(build):
    with pytest.warns(NoEffectWarning, match=f"unsupported: {build.__name__} normalises over several axes"):
        approximate(build((4, 8)), Rule(stored=StochasticRounding(4)))
