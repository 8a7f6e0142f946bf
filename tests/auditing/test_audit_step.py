"""What training loops accumulate, with the mistakes that lived for years in popular ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cheapgrad
from cheapgrad import audit_step
from cheapgrad.errors import AccumulationError, NondeterministicForwardError
from cheapgrad.sketch import RowSample

CLASSES, WIDTH, TOKENS, IGNORED = 7, 10, 6, -100
LENGTHS = (1, 6, 2, 5, 3, 6, 1, 4)


class Tagger(nn.Module):
    """A class for every token; some have no label."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, CLASSES))

    def forward(self, x):
        return self.body(x)


def token_loss(model, batch, reduction="mean"):
    logits = model(batch["x"])
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction=reduction
    )


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(LENGTHS), TOKENS, WIDTH, generator=generator)
    labels = torch.randint(CLASSES, (len(LENGTHS), TOKENS), generator=generator)
    for row, length in enumerate(LENGTHS):
        labels[row, length:] = IGNORED
    return {"x": x, "labels": labels}


def micro_batches(batch, count=4):
    return [
        dict(zip(batch, parts, strict=True)) for parts in zip(*(t.chunk(count) for t in batch.values()), strict=True)
    ]


def loop(model, batch, weight, count=4, reduction="mean"):
    """Return a loop that gives every micro-batch's loss the weight that the function says."""

    def accumulate():
        parts = micro_batches(batch, count)
        for part in parts:
            loss = token_loss(model, part, reduction)
            (loss * weight(part, parts)).backward()

    return accumulate


def labelled(part):
    return int((part["labels"] != IGNORED).sum())


def share_of_tokens(part, parts):
    return labelled(part) / sum(map(labelled, parts))


def test_right_loops_pass(batch):
    model = Tagger()
    by_share = loop(model, batch, share_of_tokens)
    report = audit_step(model, token_loss, batch, by_share, draws=8)
    assert report.unbiased, str(report)
    assert report.subject == "step"
    assert report.scale == pytest.approx(1, abs=1e-5)
    by_sum = loop(model, batch, lambda part, parts: 1 / sum(map(labelled, parts)), reduction="sum")
    assert audit_step(model, token_loss, batch, by_sum, draws=8).unbiased


MISTAKES = {
    "mean of means over unequal token counts": (lambda part, parts: 1 / len(parts), "mean", None),
    "not divided": (
        lambda part, parts: len(parts) * share_of_tokens(part, parts),
        "mean",
        "4 times its length: not div",
    ),
    "divided twice": (lambda part, parts: share_of_tokens(part, parts) / len(parts), "mean", "1/4 of its length: div"),
    "sum divided by examples": (lambda part, parts: 1 / len(LENGTHS), "sum", "has the right direction and 3.5 times"),
    "sum divided by the tokens of the micro-batch": (lambda part, parts: 1 / labelled(part), "sum", None),
    "padding counted": (
        lambda part, parts: 1 / sum(part["labels"].numel() for part in parts),
        "sum",
        "the right direction and 0.583 times its length",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found_and_described(batch, name):
    weight, reduction, words = MISTAKES[name]
    model = Tagger()
    report = audit_step(model, token_loss, batch, loop(model, batch, weight, reduction=reduction), draws=8)
    assert not report.unbiased
    assert report.verdict().startswith("BIASED in 4 of 4 parameters")
    if words is not None:
        assert words in report.verdict()
    else:
        assert "direction" not in report.verdict()


def test_lost_micro_batch_is_found(batch):
    model = Tagger()

    def accumulate():
        parts = micro_batches(batch)
        for part in parts[:-1]:
            (token_loss(model, part) * share_of_tokens(part, parts)).backward()

    assert not audit_step(model, token_loss, batch, accumulate, draws=8).unbiased


@pytest.mark.parametrize(("weight", "unbiased"), [(share_of_tokens, True), (lambda part, parts: 1 / len(parts), False)])
def test_through_dropout_and_sketches(batch, weight, unbiased):
    model = Tagger(dropout=0.05)
    cheapgrad.approximate(model, cheapgrad.Rule("*", cotangent=RowSample(keep=0.8)), skip_small=False)
    loop_of_model = loop(model, batch, weight)
    with pytest.raises(NondeterministicForwardError, match="pass seed=0"):
        audit_step(model, token_loss, batch, loop_of_model)
    report = audit_step(model, token_loss, batch, loop_of_model, seed=1, draws=128)
    assert report.unbiased == unbiased, str(report)
    # The masks of micro-batches are not those of the whole batch.
    assert report.forward_noise == "not shared"


@pytest.mark.parametrize(("weight", "unbiased"), [(share_of_tokens, True), (lambda part, parts: 1 / len(parts), False)])
def test_beside_loud_sketches(batch, weight, unbiased):
    model = Tagger()
    cheapgrad.approximate(model, cheapgrad.Rule("*", cotangent=RowSample(keep=0.2)), skip_small=False)
    report = audit_step(model, token_loss, batch, loop(model, batch, weight), draws=16)
    assert report.unbiased == unbiased, str(report)
    assert report.relative_variance > 0.1


def test_loops_that_step_or_clear(batch):
    model = Tagger()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def steps():
        loop(model, batch, share_of_tokens)()
        optimizer.step()

    def clears():
        loop(model, batch, share_of_tokens)()
        optimizer.zero_grad()

    with pytest.raises(AccumulationError, match=r"the loop changed 4 parameters, the first one is 'body\.0\.weight'"):
        audit_step(model, token_loss, batch, steps)
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))
    with pytest.raises(AccumulationError, match=r"left no gradient in \.grad"):
        audit_step(model, token_loss, batch, clears)


@pytest.mark.parametrize("loop", [None, 5])
def test_loop_that_is_none_is_refused(batch, loop):
    with pytest.raises(AccumulationError, match="accumulate must be the loop, a function without arguments"):
        audit_step(Tagger(), token_loss, batch, loop)


def test_loop_that_raises_is_named_and_undone(batch):
    model = Tagger()
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def breaks():
        with torch.no_grad():
            next(model.parameters()).zero_()
        raise KeyError("no such micro-batch")

    with pytest.raises(AccumulationError, match="the loop raised KeyError: 'no such micro-batch'"):
        audit_step(model, token_loss, batch, breaks)
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))


def test_gradients_of_before_are_put_back(batch):
    model = Tagger()
    token_loss(model, batch).backward()
    before = [parameter.grad for parameter in model.parameters()]
    values = [gradient.clone() for gradient in before]
    audit_step(model, token_loss, batch, loop(model, batch, share_of_tokens), draws=8)
    assert all(parameter.grad is gradient for parameter, gradient in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(before, values, strict=True))
