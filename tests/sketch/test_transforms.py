"""Where NumPy may read a tensor, and that a draw is the same sample wherever it is computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cheapgrad.sketch import Systematic, water_filling
from cheapgrad.sketch.transforms import is_plain


def test_plain_tensors_only():
    plain = torch.ones(3)
    assert is_plain(plain)
    assert not is_plain(plain.to("meta"))
    assert not is_plain(torch.ones(3, requires_grad=True))
    assert not is_plain(torch.nn.Parameter(plain, requires_grad=False))


def test_not_while_something_watches():
    plain = torch.ones(2, 3)
    seen = []
    torch.vmap(lambda row: seen.append(is_plain(row)) or row)(plain)
    torch.func.grad(lambda row: seen.append(is_plain(row)) or row.sum())(plain)
    with FlopCounterMode(display=False):
        seen.append(is_plain(plain))
    assert seen == [False] * 3


@pytest.mark.parametrize("permute", [True, False])
@pytest.mark.parametrize("power", [0.0, 1.0, 6.0])
def test_the_same_sample_on_the_host_and_anywhere(power, permute):
    random = np.random.default_rng(int(power))
    design = Systematic(permute=permute)
    for count in (1, 7, 30, 49, 50):
        probabilities = water_filling(torch.as_tensor(random.random(50) ** power), count)
        order = (torch.as_tensor(random.permutation(50)),) if permute else ()
        start = torch.as_tensor(random.random(1))
        here = design.select(probabilities, (*order, start), count)
        stacked = [tensor.unsqueeze(0) for tensor in (probabilities, *order, start)]
        (there,) = design.select(stacked[0], tuple(stacked[1:]), count)
        assert torch.equal(here, there.sort().values)
