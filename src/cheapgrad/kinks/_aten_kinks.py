"""How many entries of a call, at the level of ATen, lie exactly on a kink or a tie.

`torch.nn.functional` and the modules are thin layers over these operations, so that one table sees them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator

from cheapgrad.kinks._windows import PoolWindows, adaptive_windows, pool_windows


class KinkMask(NamedTuple):
    """Which of the places where a call could meet a kink do so.

    Attributes:
        at_kink: one truth value for each such place: an entry, a window, or a slice that is reduced.
        value: what stands there, of the same shape.
    """

    at_kink: Tensor
    value: Tensor


Finder = Callable[..., KinkMask | None]

# Nonsmooth operations without a finder below: they are named, never taken for smooth.
_NOT_COUNTED = frozenset({
    "aminmax",
    "atan2",
    "copysign",
    "cummax",
    "cummin",
    "dist",
    "floor_divide",
    "fmod",
    "_foreach_abs",
    "_foreach_clamp_max",
    "_foreach_clamp_min",
    "_foreach_maximum",
    "_foreach_minimum",
    "_foreach_norm",
    "fractional_max_pool2d",
    "fractional_max_pool3d",
    "grid_sampler_2d",
    "grid_sampler_3d",
    "heaviside",
    "hypot",
    "index_reduce",
    "_linalg_svd",
    "mode",
    "multi_margin_loss",
    "multilabel_margin_loss_forward",
    "nan_to_num",
    "nanmedian",
    "remainder",
    "renorm",
    "scatter_reduce",
    "segment_reduce",
    "std",
    "_cdist_forward",
    "_pdist_forward",
})  # fmt: skip

# The number by which an embedding bag takes the largest entries.
_MAX_MODE = 2


def is_not_counted(operation: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Tell whether a call is known to be nonsmooth, or may be, and no finder below knows its kinks."""
    if isinstance(operation, HigherOrderOperator):
        # Such as attention with a score function: what functions they are given is not seen.
        return True
    name = plain_name(operation)
    if name in {"_embedding_bag", "_embedding_bag_forward_only"}:
        return (args[4] if len(args) > 4 else kwargs.get("mode")) == _MAX_MODE
    return name in _NOT_COUNTED or (name == "div" and kwargs.get("rounding_mode") is not None)


def find_kinks(operation: str, args: Sequence[Any], kwargs: dict[str, Any]) -> KinkMask | None:
    """Return the kinks that a call meets; None where the operation, or this call of it, has none."""
    finder = _FINDERS.get(operation)
    if finder is None or not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
        return None
    if args[0].numel() == 0:
        return None
    with torch.no_grad():
        return finder(*args, **kwargs)


def _at(input: Tensor, *places: Any) -> KinkMask | None:
    places = tuple(place for place in places if place is not None)
    if not places:
        return None
    mask = input == places[0]
    for place in places[1:]:
        mask = mask | (input == place)
    return KinkMask(mask, input.expand(mask.shape))


def _at_zero(input: Tensor, *_: Any, **__: Any) -> KinkMask | None:
    return _at(input, 0.0)


def _hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> KinkMask | None:
    return _at(input, min_val, max_val)


def _leaky_relu(input: Tensor, negative_slope: float = 0.01) -> KinkMask | None:
    return None if negative_slope == 1 else _at(input, 0.0)


def _at_three(input: Tensor) -> KinkMask | None:
    return _at(input, -3.0, 3.0)


def _clamp(input: Tensor, min: Any = None, max: Any = None) -> KinkMask | None:
    return _at(input, min, max)


def _clamp_max(input: Tensor, max: Any) -> KinkMask | None:
    return _at(input, max)


def _threshold(input: Tensor, threshold: float, value: float) -> KinkMask | None:
    return _at(input, threshold)


def _elu(input: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> KinkMask | None:
    return None if alpha * input_scale == 1 else _at(input, 0.0)


def _shrink(input: Tensor, lambd: float = 0.5) -> KinkMask | None:
    return _at(input, -lambd, lambd)


def _at_integers(input: Tensor) -> KinkMask | None:
    return KinkMask(input == input.floor(), input)


def _at_halves(input: Tensor, *_: Any, **kwargs: Any) -> KinkMask | None:
    scaled = input * 10.0 ** kwargs.get("decimals", 0) if kwargs else input
    return KinkMask(scaled - scaled.floor() == 0.5, input)


def _equal_pair(input: Tensor, other: Tensor) -> KinkMask | None:
    return _at(input, other)


def _several(candidates: Tensor, extreme: Tensor) -> KinkMask:
    """Return which slices along the last axis attain their extreme value more than once."""
    # NaN equals nothing: what is no number has no derivative that a convention could choose.
    return KinkMask((candidates == extreme.unsqueeze(-1)).sum(-1) > 1, extreme)


def _slices(input: Tensor, dims: Sequence[int]) -> Tensor:
    """Return the input with `dims` (all, if none are given) moved to one last axis."""
    if input.dim() == 0:
        return input.reshape(1)
    reduced = sorted({dim % input.dim() for dim in dims}) or list(range(input.dim()))
    kept = [dim for dim in range(input.dim()) if dim not in reduced]
    moved = input.permute(*kept, *reduced)
    return moved.reshape(*moved.shape[: len(kept)], -1)


def _largest(input: Tensor, dim: Any = (), keepdim: bool = False) -> KinkMask | None:
    slices = _slices(input, (dim,) if isinstance(dim, int) else dim)
    return _several(slices, slices.amax(-1))


def _smallest(input: Tensor, dim: Any = (), keepdim: bool = False) -> KinkMask | None:
    slices = _slices(input, (dim,) if isinstance(dim, int) else dim)
    return _several(slices, slices.amin(-1))


def _middle(input: Tensor, dim: Any = (), keepdim: bool = False) -> KinkMask | None:
    slices = _slices(input, (dim,) if isinstance(dim, int) else dim)
    return _several(slices, slices.median(-1).values)


def _kth(input: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> KinkMask | None:
    slices = _slices(input, (dim,))
    return _several(slices, slices.kthvalue(k, -1).values)


def _sort(input: Tensor, *args: Any, **kwargs: Any) -> KinkMask | None:
    # aten.sort.stable asks for stability before the dimension.
    dim = kwargs.get("dim", next((arg for arg in args if arg is not None and not isinstance(arg, bool)), -1))
    return _neighbours(_slices(input, (dim,)))


def _topk(input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> KinkMask | None:
    slices = _slices(input, (dim,))
    # One more than is kept: the last one kept may be tied with the first one left out.
    return _neighbours(slices.sort(-1, descending=largest).values[..., : k + 1])


def _neighbours(slices: Tensor) -> KinkMask:
    """Return which slices hold a value twice; the value shown is the first such."""
    ordered = slices.sort(-1).values
    equal = ordered[..., 1:] == ordered[..., :-1]
    return KinkMask(equal.any(-1), ordered[..., 0])


def _vector_norm(
    input: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> KinkMask | None:
    slices = _slices(input, () if dim is None else (dim,) if isinstance(dim, int) else dim).abs()
    if ord == 1:
        return _at(slices, 0.0)
    largest = slices.amax(-1)
    vanishes = largest == 0
    return KinkMask(vanishes | _several(slices, largest).at_kink if ord == float("inf") else vanishes, largest)


def _pool(spatial: int) -> Finder:
    def find(input: Tensor, *args: Any, **kwargs: Any) -> KinkMask | None:
        return _in_windows(input, pool_windows(input, *args, **kwargs, spatial=spatial))

    return find


def _adaptive_pool(spatial: int) -> Finder:
    def find(input: Tensor, output_size: Sequence[int]) -> KinkMask | None:
        return _in_windows(input, adaptive_windows(input, output_size, spatial=spatial))

    return find


def _in_windows(input: Tensor, windows: PoolWindows) -> KinkMask:
    entries = windows.entries(input, -torch.inf)
    return _several(entries, windows.pooled.view(entries.shape[:-1]))


# By the name of the operation, without its overload and without the underscore of its in-place form.
_FINDERS: dict[str, Finder] = {
    "relu": _at_zero,
    "abs": _at_zero,
    "sign": _at_zero,
    "sgn": _at_zero,
    "_prelu_kernel": _at_zero,
    "rrelu_with_noise": _at_zero,
    "rrelu_with_noise_functional": _at_zero,
    "leaky_relu": _leaky_relu,
    "hardtanh": _hardtanh,
    "hardswish": _at_three,
    "hardsigmoid": _at_three,
    "elu": _elu,
    "softshrink": _shrink,
    "hardshrink": _shrink,
    "threshold": _threshold,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp_max,
    "floor": _at_integers,
    "ceil": _at_integers,
    "trunc": _at_integers,
    "frac": _at_integers,
    "round": _at_halves,
    "maximum": _equal_pair,
    "minimum": _equal_pair,
    "fmax": _equal_pair,
    "fmin": _equal_pair,
    "max": _largest,
    "amax": _largest,
    "min": _smallest,
    "amin": _smallest,
    "median": _middle,
    "kthvalue": _kth,
    "sort": _sort,
    "topk": _topk,
    "linalg_vector_norm": _vector_norm,
    "max_pool1d": _pool(1),
    "max_pool2d_with_indices": _pool(2),
    "max_pool3d_with_indices": _pool(3),
    "adaptive_max_pool2d": _adaptive_pool(2),
    "adaptive_max_pool3d": _adaptive_pool(3),
}


def plain_name(operation: Any) -> str:
    """Return ``"relu"`` for the overloads ``aten.relu.default`` and ``aten.relu_.default``; ``""`` outside ATen."""
    if isinstance(operation, HigherOrderOperator):
        return operation.name()
    namespace, _, name = operation._schema.name.partition("::")
    if namespace != "aten":
        return ""
    return name if name.startswith("_") else name.removesuffix("_")
