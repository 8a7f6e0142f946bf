"""The single door to compiled tensor functions: every codec's passes over its entries go through this file.

A codec is some fifteen operations on every entry. One after the other each is a pass over memory; compiled together
they are one. The functions are pure (what is random is drawn before and passed in) and the same in both cases, so a law
does not depend on how they run; values agree up to the rounding of the last bits.

Compiling takes seconds at the first step and needs a C++ compiler, so it is asked for (``fused=True``). Where it cannot
be had, functions run one operation after the other: quietly where that is a matter of course (inside compiled graphs,
under transforms and tracers, on few entries), with a `FusingWarning`, once, where there is no compiler, or where it
fails on a function.

Only what is stored and what the backward pass computes may be compiled: a compiler rounds where it likes, and the
forward pass is PyTorch's, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from cheapgrad.sketch._compiling import TensorFunction, Version, Versions
from cheapgrad.sketch.transforms import is_inside_transform, is_transformed

# Entries worked on at a time on a CPU, so that what lies between two operations stays in the processor's cache.
_PIECE = 1 << 19
# Fewer entries cost less than it takes to call what was compiled.
_LEAST = 1 << 14

# One for the process, as the compiler's own memory is.
_versions = Versions()


def why_unfused() -> str:
    """Return what runs unfused in this process although it was to be fused, and why; or an empty string."""
    return _versions.describe_failures()


def note_obstacle(device_type: str) -> str:
    """Return a message if ``fused=True`` has no effect on a kind of device, or an empty string.

    Args:
        device_type: such as ``"cpu"``.
    """
    return _versions.note_obstacle(device_type)


def work_by_rows(
    function: TensorFunction,
    rows: tuple[Tensor, ...],
    shared: tuple[Tensor, ...] = (),
    *,
    fused: bool = False,
    entries: int | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Return what a pure function gives for tensors whose first axis are rows, each worked on by itself.

    Args:
        function: called as ``function(*rows, *shared, **options)``; returns tensors whose first axis are the rows.
        rows: tensors with the same first axis.
        shared: tensors that all rows read.
        fused: compile the function where that can be done; otherwise rows are worked on in pieces that stay in the
            processor's cache, where pieces can be cut.
        entries: how many numbers the rows are, where they come in fewer bytes; those of the largest tensor if left out.
        **options: hashable, and few: the function is compiled anew for other ones. Numbers that may change from step to
            step belong in `shared`.

    >>> work_by_rows(lambda x, *, factor: (x * factor,), (torch.ones(2, 3),), factor=2)[0].sum()
    tensor(12.)
    """
    tensors = (*rows, *shared)
    if entries is None:
        entries = max(tensor.numel() for tensor in rows)
    if fused and entries >= _LEAST and _may_be_compiled(tensors):
        return _run_compiled(function, len(rows), tensors, options)
    count = rows[0].shape[0]
    piece = max(1, _PIECE // max(1, entries // max(1, count)))
    if count <= piece or not _may_be_cut(rows[0]):
        return function(*tensors, **options)
    joined: tuple[Tensor, ...] = ()
    for start in range(0, count, piece):
        part = slice(start, min(count, start + piece))
        results = function(*(tensor[part] for tensor in rows), *shared, **options)
        if not joined:
            joined = tuple(result.new_empty(count, *result.shape[1:]) for result in results)
        for whole, result in zip(joined, results, strict=True):
            whole[part] = result
    return joined


def _may_be_cut(tensor: Tensor) -> bool:
    """Tell whether to work in pieces: on a CPU, where nothing watches or compiles what is done."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not is_transformed(tensor)
    )


def _may_be_compiled(tensors: tuple[Tensor, ...]) -> bool:
    """Tell whether tensors are plain ones, nothing watches or compiles what is done, and there is a compiler."""
    device = tensors[0].device
    return (
        not torch.compiler.is_compiling()
        and device.type != "meta"
        and all(type(tensor) is Tensor and tensor.device == device for tensor in tensors)
        and not torch.is_inference_mode_enabled()
        and not is_inside_transform()
        and not is_in_torch_dispatch_mode()
        and not any(tensor.is_inference() for tensor in tensors)
        and _versions.is_possible(device.type)
    )


def _run_compiled(
    function: TensorFunction, row_count: int, tensors: tuple[Tensor, ...], options: dict[str, Any]
) -> tuple[Tensor, ...]:
    version = Version.of_call(function, tensors, options)
    # Tensors of their own, to be marked.
    arguments = [tensor.detach() for tensor in tensors]
    for argument in arguments[:row_count]:
        torch._dynamo.maybe_mark_dynamic(argument, 0)
    with torch.no_grad():
        try:
            run = _versions.find(version)
            if run is not None:
                return run(*arguments)
        except Exception as error:
            # Raises by itself if the tensors are at fault.
            results = function(*tensors, **options)
            _versions.give_up(version, error)
            return results
    return function(*tensors, **options)
