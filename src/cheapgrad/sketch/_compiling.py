"""Compiled versions of pure tensor functions, and what is known of why there is none."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from cheapgrad.errors import FusingWarning

#: A pure function of tensors and of options that can be hashed.
TensorFunction = Callable[..., tuple[Tensor, ...]]

_DEVICES = ("cpu", "cuda")
# Versions of one function that are compiled, each for options, types and shapes of its own. A model has a few; more are
# options that change from step to step, such as an annealed slope, where compiling would never end.
_MOST_VERSIONS = 32


def find_obstacle(device_type: str) -> str:
    """Return why nothing can be compiled for a kind of device in this process, or an empty string.

    Args:
        device_type: such as ``"cpu"``.

    >>> find_obstacle("mps")
    'codecs are compiled for cpu and cuda only'
    """
    if device_type not in _DEVICES:
        return f"codecs are compiled for {' and '.join(_DEVICES)} only"
    if torch._dynamo.config.disable:
        return "torch.compile is turned off (torch._dynamo.config.disable)"
    return _look_for_compiler(device_type)


@functools.cache
def _look_for_compiler(device_type: str) -> str:
    try:
        torch._dynamo.eval_frame.check_if_dynamo_supported()
        if device_type == "cpu":
            # Imported where it is needed: takes a second.
            from torch._inductor import cpp_builder

            # Asks the compiler for its version, or raises.
            cpp_builder.get_cpp_compiler()
            return ""
    except Exception as error:
        return _as_text(error)
    return "" if has_triton() else "Triton is not installed, or does not know this device"


@dataclass(frozen=True)
class Version:
    """What one compiled version of a function is for: whatever the compiler would compile it anew for.

    The compiler counts how often it compiled a function, and stops at eight. Were all types, ranks and contexts one
    function to it, a model of many would get there.

    Attributes:
        function: the function.
        options: its options, sorted.
        tensors: of each tensor, its type, for each axis whether it has no, one or more entries, and whether it is
            contiguous.
        device_type: of the tensors.
        autocast: the type that autocast computes in, or None outside of it.
    """

    function: TensorFunction
    options: tuple[tuple[str, Any], ...]
    tensors: tuple[tuple[torch.dtype, tuple[int, ...], bool], ...]
    device_type: str
    autocast: torch.dtype | None

    @classmethod
    def of_call(cls, function: TensorFunction, tensors: tuple[Tensor, ...], options: dict[str, Any]) -> Version:
        """Return the version for a call, now."""
        device_type = tensors[0].device.type
        shapes = (tuple(min(size, 2) for size in tensor.shape) for tensor in tensors)
        return cls(
            function,
            tuple(sorted(options.items())),
            tuple((tensor.dtype, shape, tensor.is_contiguous()) for tensor, shape in zip(tensors, shapes, strict=True)),
            device_type,
            torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None,
        )

    def __str__(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self.options)
        ranks = ", ".join(f"{str(dtype).removeprefix('torch.')}[{len(shape)}d]" for dtype, shape, _ in self.tensors)
        return f"{self.function.__name__} ({ranks}{options})"


class Versions:
    """All versions that were compiled in a process, and what went wrong."""

    def __init__(self) -> None:
        self._compiled: dict[Version, TensorFunction | None] = {}
        self._failures: dict[str, str] = {}

    def find(self, version: Version) -> TensorFunction | None:
        """Return a compiled function, or None where it was given up on, or where too many are held already."""
        if version in self._compiled:
            return self._compiled[version]
        function = version.function
        held = sum(other.function is function for other in self._compiled)
        if held < _MOST_VERSIONS:
            self._compiled[version] = _compile(version, len(self._compiled))
            return self._compiled[version]
        self._say(
            f"further versions of {function.__name__}",
            f"{held} of it are compiled for other options, types and ranks, the most that are held; do options change "
            "from step to step?",
        )
        return None

    def give_up(self, version: Version, error: Exception) -> None:
        """Run a version unfused from here on, and say so."""
        self._compiled[version] = None
        if "LimitHit" in type(error).__name__:
            reason = (
                "it was compiled anew until the compiler's limit (torch._dynamo.config.recompile_limit = "
                f"{torch._dynamo.config.recompile_limit}); do shapes change from step to step?"
            )
        else:
            reason = f"compiling failed: {_as_text(error)}"
        self._say(str(version), reason)

    def note_obstacle(self, device_type: str) -> str:
        """Return a message if nothing can be compiled for a kind of device, or an empty string.

        Calls of functions do not say it again.
        """
        reason = find_obstacle(device_type)
        if not reason:
            return ""
        what = f"all codecs on {device_type}"
        self._failures[what] = reason
        return _message(what, reason)

    def is_possible(self, device_type: str) -> bool:
        """Tell whether functions can be compiled for a kind of device; where not, say so once."""
        reason = find_obstacle(device_type)
        if reason:
            self._say(f"all codecs on {device_type}", reason)
        return not reason

    def describe_failures(self) -> str:
        """Return what runs unfused although it was to be fused, and why; an empty string if nothing does."""
        return "; ".join(f"{what}: {reason}" for what, reason in self._failures.items())

    def _say(self, what: str, reason: str) -> None:
        if what not in self._failures:
            self._failures[what] = reason
            warnings.warn(_message(what, reason), FusingWarning, stacklevel=3)


def _message(what: str, reason: str) -> str:
    return (
        f"fused=True has no effect on {what}: {reason}; unfused they are as correct, and slower (`cheapgrad doctor` "
        "checks the compiler)"
    )


def _compile(version: Version, number: int) -> TensorFunction:
    function, options = version.function, dict(version.options)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return function(*tensors, **options)

    # A code object and a name of its own: the compiler counts versions, and guesses which sizes vary, by these.
    code = call.__code__.replace(co_name=f"fused_{function.__name__}_{number}")
    own = types.FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)
    return torch.compile(own, fullgraph=True)


def _as_text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
