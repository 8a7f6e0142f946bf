"""What the ledger assumes of names that PyTorch does not promise to keep."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from cheapgrad.cost._autograd_state import (
    hooked_tensors,
    in_custom_function,
    is_checkpoint_code,
    is_checkpoint_hook,
    is_selective,
    next_node_number,
    running_node,
    running_pass,
    saving_hooks,
)


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
    def keep(tensor):
        return tensor

    assert saving_hooks() is None
    with saved_tensors_hooks(keep, keep):
        assert saving_hooks() == (keep, keep)
    assert saving_hooks() is None


class _Doubles(torch.autograd.Function):
    """Notes whether its forward is seen to be one."""

    inside = None

    @staticmethod
    def forward(x):
        _Doubles.inside = in_custom_function()
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output, inputs[0])

    @staticmethod
    def backward(ctx, cotangent):
        return 2 * cotangent


def test_forward_of_a_custom_function_is_seen():
    x = torch.ones(2, requires_grad=True)
    _Doubles.apply(x)
    assert _Doubles.inside
    with torch.no_grad():
        assert not in_custom_function()


def test_what_hooks_keep_is_found_at_the_node():
    def pack(tensor):
        return ("packed", tuple(tensor.shape))

    def unpack(kept):
        return torch.ones(kept[1])

    x = torch.ones(2, requires_grad=True)
    with saved_tensors_hooks(pack, unpack):
        nodes = [x.exp().grad_fn, torch.stack([x, x]).grad_fn, (x * 2).grad_fn, _Doubles.apply(x).grad_fn]
    kept = [[kept for hook, kept in hooked_tensors(node) if hook is unpack] for node in nodes]
    assert kept == [[("packed", (2,))], [], [], [("packed", (2,))] * 2]
    assert list(hooked_tensors(x.exp().grad_fn)) == []
    assert not is_checkpoint_hook(unpack)


def test_checkpoints_are_told_by_their_code():
    frames, hooks = [], {}

    def pack(tensor):
        frames.append(is_checkpoint_code(sys._getframe(1)))
        return tensor

    def contexts():
        return nullcontext(), torch.autocast("cpu", enabled=False)

    x = torch.ones(2, requires_grad=True)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        x.exp()
        for name, options in {"plain": {}, "selective": {"context_fn": contexts}}.items():
            y = checkpoint(torch.exp, x, use_reentrant=False, **options)
            [(hooks[name], _)] = hooked_tensors(y.grad_fn)
    assert frames == [False, True, True]
    assert all(map(is_checkpoint_hook, hooks.values()))
    assert {name: is_selective(hook) for name, hook in hooks.items()} == {"plain": False, "selective": True}
