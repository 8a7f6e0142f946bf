"""An embedding's gradient from drawn tokens: against PyTorch, its law by enumeration, and what is refused by name."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from cheapgrad import Rule, approximate
from cheapgrad.errors import ForwardModeError, NoEffectWarning, SecondDerivativeError
from cheapgrad.sketch import ColumnSample, ExampleSample, RowSample, StochasticRounding, Uniform
from cheapgrad.sketch._row_sampling import AbstractRowSampling
from cheapgrad.sketch.selection import Selection
from tests.ops.chains.networks import HALF, Chosen, choose_all_rows

ROWS, WIDTH = 7, 4
OPTIONS = {
    "plain": {},
    "padding": {"padding_idx": 2},
    "by frequency": {"scale_grad_by_freq": True},
    "both": {"padding_idx": 2, "scale_grad_by_freq": True},
}
TOKENS = torch.tensor([[2, 5, 5], [0, 2, 5]])


def build(**options):
    torch.manual_seed(0)
    return nn.Embedding(ROWS, WIDTH, dtype=torch.float64, **options)


def converted(module, strategy=HALF):
    ours = copy.deepcopy(module)
    approximate(ours, Rule(cotangent=strategy), skip_small=False)
    assert type(ours).__name__ == "SketchedEmbedding"
    return ours


def gradient(module, tokens=TOKENS):
    output = module(tokens)
    cotangent = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(output, module.weight, cotangent)[0]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_exact_where_all_tokens_are_kept(options, monkeypatch):
    choose_all_rows(monkeypatch)
    module = build(**options)
    ours = converted(module)
    assert torch.equal(ours(TOKENS), module(TOKENS))
    torch.testing.assert_close(gradient(ours), gradient(module), rtol=1e-14, atol=0)


def outcomes(module, monkeypatch, scale=2.0):
    ours = converted(module, RowSample(0.5, scores=Uniform()))
    drawn = []
    for index in itertools.combinations(range(6), 3):
        Chosen(monkeypatch, index, [scale] * 3)
        drawn.append(gradient(ours))
    return torch.stack(drawn)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_mean_of_all_outcomes_is_the_gradient(options, monkeypatch):
    module = build(**options)
    torch.testing.assert_close(outcomes(module, monkeypatch).mean(0), gradient(module), rtol=1e-12, atol=1e-14)


def test_a_biased_twin_is_caught(monkeypatch):
    module = build()
    assert not torch.allclose(outcomes(module, monkeypatch, scale=1.9).mean(0), gradient(module), rtol=1e-2)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_spread_is_the_law(options, monkeypatch):
    # Uniform scores, three of six: the law is exact for equal probabilities.
    module = build(**options)
    drawn, exact = outcomes(module, monkeypatch), gradient(module)
    monkeypatch.undo()
    ours = copy.deepcopy(module)
    handle = approximate(ours, Rule(cotangent=RowSample(0.5, scores=Uniform())), skip_small=False)
    cotangent = torch.randn(2, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (row,) = handle.predict(lambda: (ours(TOKENS) * cotangent).sum())
    spread = float((drawn - exact).square().sum((1, 2)).mean())
    # Systematic sampling after a random order draws all triples alike.
    assert row.weight_variance == pytest.approx(spread, rel=1e-9)


def test_a_padding_token_is_never_drawn_while_others_are_left(monkeypatch):
    module = build(padding_idx=2)
    chosen = Chosen(monkeypatch, [0, 1, 2], [2.0] * 3)
    gradient(converted(module))
    assert not chosen.cotangents[0][TOKENS.flatten() == 2].any()
    assert chosen.cotangents[0][TOKENS.flatten() != 2].any(1).all()


def test_whole_examples_may_be_drawn():
    ours = converted(build(), ExampleSample(0.5))
    drawn = gradient(ours)
    assert drawn[5].any()
    assert drawn.abs().sum() > 0


def test_a_nan_is_never_sampled_away():
    ours = converted(build(), RowSample(0.2))
    output = ours(TOKENS)
    cotangent = torch.ones_like(output)
    cotangent[1, 0, 0] = float("nan")
    assert torch.autograd.grad(output, ours.weight, cotangent)[0][0].isnan().any()


def test_tied_with_the_output_layer_the_sum_is_unbiased(monkeypatch):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = build(), nn.Linear(WIDTH, ROWS, bias=False, dtype=torch.float64)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.embedding(tokens))

    torch.manual_seed(0)
    model = Tied()
    exact = grad_of(model)
    handle = approximate(model, Rule("*", cotangent=RowSample(0.5, scores=Uniform())), skip_small=False)
    assert ["tied with" in row.remark for row in handle.rows] == [True, True]
    total, triples = 0, list(itertools.combinations(range(6), 3))
    for pair in itertools.product(triples, triples):
        draws = list(pair)

        def select(strategy, operands, rows, draws=draws):
            return Selection(torch.tensor(draws.pop()), torch.full((3,), 2.0, dtype=torch.float64), rows)

        monkeypatch.setattr(AbstractRowSampling, "select", select)
        total = total + grad_of(model) / len(triples) ** 2
        assert not draws, "both draw"
    torch.testing.assert_close(total, exact)


def grad_of(model):
    output = model(TOKENS)
    cotangent = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(output, model.embedding.weight, cotangent)[0]


@pytest.mark.parametrize(
    ("options", "rule", "words"),
    [
        ({"sparse": True}, Rule(cotangent=HALF), "sparse=True"),
        ({"max_norm": 1.0}, Rule(cotangent=HALF), "max_norm="),
        ({}, Rule(cotangent=ColumnSample(0.5)), "ColumnSample has no meaning for Embedding"),
        ({}, Rule(stored=StochasticRounding(4)), "there is nothing to encode"),
    ],
)
def test_what_is_not_covered_is_named(options, rule, words):
    module = build(**options)
    with pytest.warns(NoEffectWarning, match=words):
        approximate(module, rule, skip_small=False)


def test_it_is_left_alone_because_it_saves_no_time():
    with pytest.warns(NoEffectWarning, match="no faster than a native Embedding"):
        approximate(build(), Rule(cotangent=HALF))


def test_second_derivatives_are_refused():
    ours = converted(build())
    (first,) = torch.autograd.grad(ours(TOKENS).square().sum(), ours.weight, create_graph=True)
    with pytest.raises(SecondDerivativeError, match="embedding"):
        first.sum().backward()


def test_forward_mode_is_refused():
    ours = converted(build())
    weight = ours.weight.detach()
    with pytest.raises(ForwardModeError, match="embedding"):
        torch.func.jvp(lambda w: functional_call(ours, {"weight": w}, (TOKENS,)), (weight,), (weight,))


def test_per_example_gradients(monkeypatch):
    choose_all_rows(monkeypatch)
    module, results = build(), []
    for one in (module, converted(module)):
        weight = one.weight.detach()
        loss = lambda w, t, one=one: functional_call(one, {"weight": w}, (t,)).square().sum()  # noqa: E731
        results.append(vmap(grad(loss), (None, 0))(weight, TOKENS))
    torch.testing.assert_close(*results)


def test_compiled():
    ours = converted(build(), RowSample(0.5))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    cotangent = torch.ones(2, 3, WIDTH, dtype=torch.float64)
    output = compiled(TOKENS)
    drawn = torch.autograd.grad(output, ours.weight, cotangent)[0]
    assert torch.equal(output, torch.nn.functional.embedding(TOKENS, ours.weight))
    # All scores are equal: three tokens of six, each counted twice.
    assert drawn.sum() == pytest.approx(6 * WIDTH)


def test_frozen():
    ours = converted(build())
    ours.requires_grad_(False)
    assert not ours(TOKENS).requires_grad
