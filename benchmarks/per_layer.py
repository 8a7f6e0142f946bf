"""A draw of rows for each linear layer, as it would be without chains: what chains are compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from torch import nn

import cheapgrad
from cheapgrad.ops.chains import joining
from cheapgrad.sketch import OrderedPivotal, RowSample


def rules_per_layer(keep: float) -> tuple[cheapgrad.Rule, ...]:
    """Return the rows of `cheapgrad.recipes.speed` for linear layers alone; norms and activations stay exact."""
    return (cheapgrad.Rule(nn.Linear, cotangent=RowSample(keep, design=OrderedPivotal())),)


@contextlib.contextmanager
def without_chains() -> Iterator[None]:
    """Let no layer that runs forward inside join a chain: each draws by itself."""
    with (
        mock.patch.object(joining, "chain_of", return_value=None),
        mock.patch.object(joining, "recognise_chain", return_value=None),
    ):
        yield
