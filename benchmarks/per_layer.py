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
    # By a function of our own: a mock would keep every tensor that it was called with.
    with mock.patch.multiple(joining, chain_of=_find_none, recognise_chain=_find_none):
        yield


def _find_none(*arguments: object) -> None:
    """Find no chain."""
