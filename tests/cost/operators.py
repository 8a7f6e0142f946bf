"""Custom operators whose FLOPs are what a test says they are."""

from __future__ import annotations

import torch

from cheapgrad.cost import register_formula


def define_operator(name: str, gradient_flops: int):
    """Return an operator that doubles: 10 FLOPs an entry forward, `gradient_flops` backward."""
    names = [f"cheapgrad_tests::{name}", f"cheapgrad_tests::{name}_gradient"]
    operator, gradient = (
        torch.library.custom_op(full_name, lambda x: x * 2, mutates_args=(), schema="(Tensor x) -> Tensor")
        for full_name in names
    )
    operator.register_autograd(lambda ctx, cotangent: gradient(cotangent))
    packet = getattr(torch.ops.cheapgrad_tests, name)
    register_formula(packet, lambda x, out: 10 * x.numel(), replace=True)
    gradient_packet = getattr(torch.ops.cheapgrad_tests, f"{name}_gradient")
    register_formula(gradient_packet, lambda x, out: gradient_flops * x.numel(), replace=True)
    return packet
