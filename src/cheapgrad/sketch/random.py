"""The single door to randomness: every draw of cheapgrad goes through this file.

Four facts of PyTorch shape it:

* Inside a compiled region a draw that no forward output depends on may be drawn again in the backward graph, which
  silently turns the gradient into noise around zero. There, draws go through a custom operator that takes a real
  activation as an argument, tagged as seeded randomness. That alone is not enough. The partitioner still repeats the
  operator wherever its arguments are smaller than what was drawn from it: `anchor` ties what a layer keeps to its
  output; the forward pass then needs the draw, and it is never repeated. And two draws for the same activation, as for
  queries, keys and values, are merged as a common subexpression: every draw of a graph carries a number of its own.
* Only torch's default generator is restored by activation checkpointing and saved with checkpoints, so layers use no
  other one. Function-style callers may pass ``generator=``.
* A reentrant checkpoint runs a layer twice from the same random state, first without gradients; which tensors the layer
  will keep, and so how much it will draw, shows the second time only. Inside `own_stream` a layer's draws come from a
  generator of its own, seeded by one number of the default one: both runs leave the default generator alike, and the
  dropout behind the layer keeps its mask.
* Trainers seed all ranks alike. With equal seeds every rank would draw the same sketch and averaging over ranks would
  not reduce its variance, so the rank is folded into the drawn bits (a bijection: the distribution stays uniform).
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.distributed
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from cheapgrad.sketch.transforms import is_inside_transform, is_plain

_BITS = 32
_MASK = (1 << _BITS) - 1


# The generator of the layer that is running, or None.
_stream: contextvars.ContextVar[torch.Generator | None] = contextvars.ContextVar("stream", default=None)


@contextlib.contextmanager
def own_stream(like: Tensor) -> Iterator[None]:
    """Let the draws inside come from a generator of their own, seeded by one number of the default generator.

    Under tracers and transforms, which have no numbers to seed with, the default generator stays in use.

    Args:
        like: a real activation; fixes the device.
    """
    if not _has_numbers(like):
        yield
        return
    generator = torch.Generator(like.device)
    generator.manual_seed(_draw_seed())
    token = _stream.set(generator)
    try:
        yield
    finally:
        _stream.reset(token)


def skip_stream(like: Tensor) -> None:
    """Take from the default generator what `own_stream` takes, and draw nothing."""
    if _has_numbers(like):
        _draw_seed()


def _has_numbers(like: Tensor) -> bool:
    return not (
        torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
        or like.is_meta
        or is_inside_transform()
        or is_in_torch_dispatch_mode()
    )


def _draw_seed() -> int:
    return int(torch.randint(0, (1 << 63) - 1, (), dtype=torch.int64))


def _stream_for(device: torch.device) -> torch.Generator | None:
    if torch.compiler.is_compiling():
        return None
    generator = _stream.get()
    return generator if generator is not None and generator.device.type == device.type else None


def _salt() -> int | None:
    """Return this process's rank, or None where there is one process only."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    return torch.distributed.get_rank() if torch.distributed.get_world_size() > 1 else None


def _mix_bits(bits: Tensor, salt: int) -> Tensor:
    """Map 32-bit integers (held in int64) one to one, differently for every salt.

    A xor with an odd multiple of the salt, then three rounds of xor-shift and odd multiplication modulo 2**32, each of
    which is invertible.
    """
    mixed = bits ^ ((salt * 0x9E3779B1) & _MASK)
    for multiplier in (0x7FEB352D, 0x2C1B3C6D, 0x297A2D39):
        mixed = mixed ^ (mixed >> 16)
        mixed = (mixed * multiplier) & _MASK
    return mixed ^ (mixed >> 15)


def _draw_uniform(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    salt = _salt()
    generator = generator if generator is not None else _stream_for(device)
    if salt is None:
        return torch.rand(shape, dtype=dtype, device=device, generator=generator)
    # All ranks take this path, rank 0 too, so that generators seeded alike stay in step.
    # Two words per number would be needed for 53 bits; 32 bits keep every probability right to 2**-32. Single precision
    # takes 24 of them, as torch.rand does, because rounding 32 bits could give 1.0.
    bits = torch.randint(0, 1 << _BITS, shape, dtype=torch.int64, device=device, generator=generator)
    mixed = _mix_bits(bits, salt)
    if dtype == torch.float64:
        return (mixed.to(dtype) + 0.5) / (1 << _BITS)
    return (mixed >> 8).to(dtype) / (1 << 24)


torch.library.define(
    "cheapgrad::uniform",
    "(Tensor like, SymInt[] shape, bool double, int number) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded,),
)


@torch.library.impl("cheapgrad::uniform", "CompositeExplicitAutograd")
def _uniform_operator(like: Tensor, shape: Sequence[int], double: bool, number: int) -> Tensor:
    return _draw_uniform(shape, torch.float64 if double else torch.float32, like.device, None)


@torch.library.register_fake("cheapgrad::uniform")
def _uniform_fake(like: Tensor, shape: Sequence[int], double: bool, number: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float64 if double else torch.float32)


_draws_traced = itertools.count()


def _number_of_draw() -> int:
    """Return another number at every call; the compiler calls it while it traces and writes the number down."""
    return next(_draws_traced)


# What `torch.compiler.assume_constant_result` does, which would import the compiler with this package.
_number_of_draw._dynamo_marked_constant = True  # type: ignore[attr-defined] - a mark on a function


torch.library.define("cheapgrad::anchor", "(Tensor tensor, Tensor[] kept) -> Tensor")


@torch.library.impl("cheapgrad::anchor", "CompositeExplicitAutograd")
def _anchor_operator(tensor: Tensor, kept: Sequence[Tensor]) -> Tensor:
    return tensor.clone()


@torch.library.register_fake("cheapgrad::anchor")
def _anchor_fake(tensor: Tensor, kept: Sequence[Tensor]) -> Tensor:
    return torch.empty_like(tensor)


def anchor(tensor: Tensor, kept: Sequence[Tensor]) -> Tensor:
    """Return `tensor`, and inside compiled graphs a copy that formally depends on `kept`.

    Args:
        tensor: something small that the forward output is computed from, such as a bias.
        kept: what was drawn in the forward pass for the backward pass.
    """
    if not kept or not torch.compiler.is_compiling():
        return tensor
    return torch.ops.cheapgrad.anchor(tensor, list(kept))


def anchor_parameters(weight: Tensor, bias: Tensor | None, kept: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias, the smaller one anchored to `kept`."""
    if bias is None:
        return anchor(weight, kept), None
    return weight, anchor(bias, kept)


def uniform(
    like: Tensor, shape: Sequence[int], *, double: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Draw independent numbers, uniform on [0, 1).

    Args:
        like: a real activation or cotangent; fixes the device, and anchors the draw inside compiled graphs.
        shape: shape of the result.
        double: float64 if true (probabilities), float32 otherwise (dithers).
        generator: a generator for function-style use; layers leave it out.

    Returns:
        A tensor of `shape`; on rank r of a process group independent of the other ranks' even under equal seeds.
    """
    if torch.compiler.is_compiling() and generator is None:
        return torch.ops.cheapgrad.uniform(like, list(shape), double, _number_of_draw())
    return _draw_uniform(shape, torch.float64 if double else torch.float32, like.device, generator)


def permutation(like: Tensor, shape: Sequence[int], *, generator: torch.Generator | None = None) -> Tensor:
    """Draw independent random orders of ``0, ..., n - 1``, all orders alike, as int64.

    Args:
        like: as for `uniform`.
        shape: ``[..., n]``.
        generator: as for `uniform`.
    """
    if len(shape) == 1 and _salt() is None and is_plain(like):
        # Without a sort: a sixth of the time.
        return torch.randperm(shape[0], generator=generator if generator is not None else _stream_for(like.device))
    return uniform(like, shape, generator=generator).argsort(dim=-1)


def signs(like: Tensor, shape: Sequence[int], *, generator: torch.Generator | None = None) -> Tensor:
    """Draw independent fair signs as a boolean tensor; true stands for -1."""
    return uniform(like, shape, double=False, generator=generator) < 0.5


def normal(like: Tensor, shape: Sequence[int], *, generator: torch.Generator | None = None) -> Tensor:
    """Draw independent standard normal numbers (float32) by the Box-Muller transform of `uniform`."""
    uniform_pair = uniform(like, (2, *shape), double=True, generator=generator)
    radius = (-2 * torch.log1p(-uniform_pair[0])).sqrt()
    return (radius * torch.cos(2 * torch.pi * uniform_pair[1])).float()


def integers(like: Tensor, high: int, shape: Sequence[int], *, generator: torch.Generator | None = None) -> Tensor:
    """Draw independent integers, uniform on {0, ..., high - 1}, as int64."""
    return (uniform(like, shape, generator=generator) * high).long().clamp(max=high - 1)
