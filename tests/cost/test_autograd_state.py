"""What the ledger assumes of names that PyTorch does not promise to keep."""

from __future__ import annotations

import torch
from torch.autograd.graph import saved_tensors_hooks

from cheapgrad.cost._autograd_state import has_saving_hooks, next_node_number, running_node, running_pass


def test_nodes_are_numbered_in_the_order_they_are_made():
    x = torch.ones(2, requires_grad=True)
    first = next_node_number()
    y = x * 2
    assert next_node_number() == first + 1
    with torch.no_grad():
        x * 2
    z = y.exp()
    assert next_node_number() == first + 2
    assert [y.grad_fn._sequence_nr(), z.grad_fn._sequence_nr()] == [first, first + 1]


def test_tensors_are_saved_when_their_node_has_its_number():
    numbers = []
    with saved_tensors_hooks(lambda tensor: numbers.append(next_node_number()) or tensor, lambda tensor: tensor):
        first = next_node_number()
        x = torch.ones(2, 2, requires_grad=True)
        # One saves its inputs, the other its output.
        (x @ x).exp()
    assert numbers == [first + 1, first + 1, first + 2]


def test_running_node_and_pass():
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x.exp()
    y.register_hook(lambda grad: seen.append(running_pass()))
    x.register_hook(lambda grad: seen.append(running_node()))
    assert (running_node(), running_pass()) == (None, -1)
    y.sum().backward()
    assert seen[0] >= 0
    assert (running_node(), running_pass()) == (None, -1)


def test_saving_hooks_are_seen():
    assert not has_saving_hooks()
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert has_saving_hooks()
    assert not has_saving_hooks()
