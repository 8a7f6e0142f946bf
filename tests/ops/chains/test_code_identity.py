"""Compiled graphs that are kept on disk belong to the code that they were traced from."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import cheapgrad
from cheapgrad.ops.chains import code_identity
from cheapgrad.ops.chains.code_identity import hash_files, is_ours
from cheapgrad.ops.chains.operator import plan_text
from cheapgrad.sketch import Poisson, RowSample, StochasticRounding


@dataclass(frozen=True, repr=False)
class OurPoisson(Poisson):
    """A design of a user."""


def write(folder, **texts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return folder


def test_the_hash_is_of_names_and_contents_alone(tmp_path):
    one = write(tmp_path / "one", a="x = 1", b="y = 2")
    same = write(tmp_path / "same", b="y = 2", a="x = 1")
    os.utime(same / "a.py", (0, 0))
    assert hash_files(one) == hash_files(same)
    others = [{"a": "x = 1", "b": "y = 3"}, {"a": "x = 1", "c": "y = 2"}, {"a": "x = 1"}]
    hashes = {hash_files(write(tmp_path / str(number), **texts)) for number, texts in enumerate(others)}
    assert len(hashes | {hash_files(one)}) == 4


def test_code_of_a_user_is_left_to_the_compiler():
    theirs = RowSample(0.5, design=OurPoisson())
    assert is_ours(RowSample(0.5))
    assert is_ours(None)
    assert not is_ours(theirs)
    assert plan_text(None, RowSample(0.5), recompute=False)
    assert not plan_text(None, theirs, recompute=False)
    assert not plan_text(StochasticRounding(4), theirs, recompute=False)


@pytest.mark.parametrize("layer", [nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Dropout(0.5)])
def test_graphs_name_the_code(layer, monkeypatch):
    texts = []

    def backend(graph, inputs):
        texts.extend(str(node.args) for node in graph.graph.nodes if "row_wise" in str(node.target))
        return graph.forward

    monkeypatch.setattr(code_identity, "hash_files", lambda folder: "the code of today")
    model = nn.Sequential(layer)
    cheapgrad.approximate(model, cheapgrad.Rule("*", stored=StochasticRounding(4)), skip_small=False)
    torch._dynamo.reset()
    torch.compile(model, backend=backend)(torch.randn(8, 64, requires_grad=True))
    assert texts
    assert all("the code of today" in text for text in texts)
