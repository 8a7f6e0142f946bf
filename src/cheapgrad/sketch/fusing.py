"""The single door to compiled tensor functions: every codec's passes over its entries go through this file.

A codec is some fifteen operations on every entry. One after the other each is a pass over memory; compiled together
they are one. The functions are pure (what is random is drawn before and passed in) and the same in both cases, so a law
does not depend on how they run; values agree up to the rounding of the last bits.

Compiling takes seconds at the first step and needs a C++ compiler, so it is asked for (``fused=True``). Where it cannot
be had, functions run one operation after the other: quietly where that is a matter of course (inside compiled graphs,
under transforms and tracers, on few entries), with a `FusingWarning`, once, where the compiler fails.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from cheapgrad.errors import FusingWarning
from cheapgrad.sketch.transforms import is_inside_transform, is_transformed

#: A pure function of tensors and of options that can be hashed.
TensorFunction = Callable[..., tuple[Tensor, ...]]

# Entries worked on at a time on a CPU, so that what lies between two operations stays in the processor's cache.
_PIECE = 1 << 19
# Fewer entries cost less than it takes to call what was compiled.
_LEAST = 1 << 14
_DEVICES = ("cpu", "cuda")


class _Compiler:
    """Whether functions can be compiled in this process, as far as was tried.

    Attributes:
        failure: what went wrong, or an empty string.
    """

    def __init__(self) -> None:
        self.failure = ""

    def give_up(self, error: Exception) -> None:
        """Compile nothing from here on, and say so."""
        text = " ".join(str(error).split())[:200]
        self.failure = f"{type(error).__name__}: {text}"
        warnings.warn(
            f"codecs were to be fused (fused=True), but compiling failed: {self.failure}; they run unfused, as correct "
            "and slower; `cheapgrad doctor` checks the compiler",
            FusingWarning,
            stacklevel=3,
        )


# One for the process: a missing compiler is missing for all functions.
_compiler = _Compiler()


def why_unfused() -> str:
    """Return why nothing is compiled in this process although it was asked for; an empty string if nothing failed."""
    return _compiler.failure


def work_by_rows(
    function: TensorFunction,
    rows: tuple[Tensor, ...],
    shared: tuple[Tensor, ...] = (),
    *,
    fused: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Return what a pure function gives for tensors whose first axis are rows, each worked on by itself.

    Args:
        function: called as ``function(*rows, *shared, **options)``; returns tensors whose first axis are the rows.
        rows: tensors with the same first axis.
        shared: tensors that all rows read.
        fused: compile the function where that can be done; otherwise rows are worked on in pieces that stay in the
            processor's cache, where pieces can be cut.
        **options: hashable; the function is compiled anew for other ones.

    >>> work_by_rows(lambda x, *, factor: (x * factor,), (torch.ones(2, 3),), factor=2)[0].sum()
    tensor(12.)
    """
    tensors = (*rows, *shared)
    if fused and _may_be_compiled(tensors):
        return _run_compiled(function, len(rows), tensors, options)
    count = rows[0].shape[0]
    piece = max(1, _PIECE // max(1, rows[0].numel() // max(1, count)))
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
    """Tell whether tensors are plain ones, and enough, and nothing watches or compiles what is done."""
    device = tensors[0].device
    return (
        not torch.compiler.is_compiling()
        and not _compiler.failure
        and device.type in _DEVICES
        and tensors[0].numel() >= _LEAST
        and all(type(tensor) is Tensor and tensor.device == device for tensor in tensors)
        and not torch.is_inference_mode_enabled()
        and not is_inside_transform()
        and not is_in_torch_dispatch_mode()
        and not any(tensor.is_inference() for tensor in tensors)
    )


def _run_compiled(
    function: TensorFunction, row_count: int, tensors: tuple[Tensor, ...], options: dict[str, Any]
) -> tuple[Tensor, ...]:
    # Tensors of their own, to be marked.
    arguments = [tensor.detach() for tensor in tensors]
    for argument in arguments[:row_count]:
        torch._dynamo.maybe_mark_dynamic(argument, 0)
    with torch.no_grad():
        try:
            return _compiled(function, tuple(sorted(options.items())))(*arguments)
        except Exception as error:
            # Raises by itself if the tensors are at fault.
            results = function(*tensors, **options)
            _compiler.give_up(error)
            return results


@functools.cache
def _compiled(function: TensorFunction, options: tuple[tuple[str, Any], ...]) -> TensorFunction:
    bound_options = dict(options)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return function(*tensors, **bound_options)

    # A code object of its own: the compiler counts the versions of a function by its code.
    code = call.__code__.replace(co_name=f"fused_{function.__name__}")
    own = types.FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)
    return torch.compile(own, fullgraph=True)
