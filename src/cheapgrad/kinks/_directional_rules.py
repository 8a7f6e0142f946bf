"""What each nonsmooth function of torch becomes when its kinks are decided by a direction.

Every rule returns torch's own value, and at kinks, and only there, the value of the piece that the direction enters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cheapgrad.kinks._decisions import Decisions, read_tangent
from cheapgrad.kinks._pointwise import BREAKPOINTS, Breakpoint
from cheapgrad.kinks._windows import PoolWindows, adaptive_windows, pool_windows
from cheapgrad.kinks.max_pool import attains

Rule = Callable[..., Any]

_COMPARISONS = {
    "gt": torch.gt,
    "ge": torch.ge,
    "lt": torch.lt,
    "le": torch.le,
    "eq": torch.eq,
    "ne": torch.ne,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "not_equal": torch.ne,
}


def find_rule(name: str) -> Rule | None:
    """Return the rule for a function of torch, called as ``rule(decisions, *args, **kwargs)``; None without one."""
    plain = name.strip("_") if name in {"__eq__", "__ne__", "__abs__"} else name.removesuffix("_")
    if plain in BREAKPOINTS:
        return _pointwise(plain, always_in_place=plain != name)
    return _RULES.get(plain if plain in _COMPARISONS else name)


def _pointwise(name: str, always_in_place: bool) -> Rule:
    """Build the rule of a function that acts entry by entry."""
    stock = getattr(functional, name, None) or getattr(torch, name)

    def rule(decisions: Decisions, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        in_place = kwargs.pop("inplace", False) or always_in_place
        # What is kept for the backward pass must not be what is written to.
        source = input.clone() if in_place else input
        if any(isinstance(bound, Tensor) for bound in (*args, *kwargs.values())):
            result = _clamp_between(decisions, source, *args, **kwargs)
        else:
            result = _choose_slopes(
                decisions, source, stock(source, *args, **kwargs), BREAKPOINTS[name](*args, **kwargs)
            )
        return input.copy_(result) if in_place else result

    return rule


def _choose_slopes(decisions: Decisions, input: Tensor, value: Tensor, breakpoints: Sequence[Breakpoint]) -> Tensor:
    """Replace, at each kink, the function by the line that the direction follows."""
    tangent = read_tangent(input)
    for at, left, right in breakpoints:
        at_kink = input.detach() == at
        side = decisions.choose_side(at_kink, torch.where(at_kink, tangent, 0.0))
        # Where the direction leads nowhere, either side is as good: the lower one is taken.
        above, below = (torch.as_tensor(slope, dtype=value.dtype, device=value.device) for slope in (right, left))
        slope = torch.where(side > 0, above, below)
        value = torch.where(at_kink, value.detach() + slope * (input - input.detach()), value)
    return value


def _prelu(decisions: Decisions, input: Tensor, weight: Tensor) -> Tensor:
    slopes = weight.detach()
    if slopes.numel() > 1 and input.dim() > 1:
        slopes = slopes.view(-1, *[1] * (input.dim() - 2))
    value = functional.prelu(input, weight)
    return _choose_slopes(decisions, input, value, [Breakpoint(0.0, slopes.expand_as(input), 1.0)])


def _threshold(decisions: Decisions, input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    # With another value the function jumps, and a jump has no derivative to choose.
    if threshold != value:
        return NotImplemented
    source = input.clone() if inplace else input
    result = functional.threshold(source, threshold, value)
    result = _choose_slopes(decisions, source, result, [Breakpoint(threshold, 0.0, 1.0)])
    return input.copy_(result) if inplace else result


def _clamp_between(
    decisions: Decisions, input: Tensor, min: Tensor | float | None = None, max: Tensor | float | None = None
) -> Tensor:
    """Clamp with bounds that are tensors and may depend on the input themselves."""
    if min is not None:
        input = _larger(decisions, input, torch.as_tensor(min, dtype=input.dtype, device=input.device))
    if max is not None:
        input = _smaller(decisions, input, torch.as_tensor(max, dtype=input.dtype, device=input.device))
    return input


def _larger(decisions: Decisions, input: Tensor, other: Tensor, stock: Rule = torch.maximum) -> Tensor:
    difference = read_tangent(input) - read_tangent(other)
    return _one_of_two(decisions, input, other, difference, stock(input, other))


def _smaller(decisions: Decisions, input: Tensor, other: Tensor, stock: Rule = torch.minimum) -> Tensor:
    difference = read_tangent(other) - read_tangent(input)
    return _one_of_two(decisions, input, other, difference, stock(input, other))


def _one_of_two(decisions: Decisions, input: Tensor, other: Tensor, toward_input: Tensor, value: Tensor) -> Tensor:
    tied = input.detach() == other.detach()
    side = decisions.choose_side(tied, torch.where(tied, toward_input, 0.0))
    return torch.where(tied, torch.where(side >= 0, input, other), value)


def _fmax(decisions: Decisions, input: Tensor, other: Tensor) -> Tensor:
    return _larger(decisions, input, other, torch.fmax)


def _fmin(decisions: Decisions, input: Tensor, other: Tensor) -> Tensor:
    return _smaller(decisions, input, other, torch.fmin)


def _max(decisions: Decisions, input: Tensor, dim: Any = None, keepdim: bool = False, *, other: Any = None) -> Any:
    return _extreme(decisions, 1, input, dim, keepdim, other)


def _min(decisions: Decisions, input: Tensor, dim: Any = None, keepdim: bool = False, *, other: Any = None) -> Any:
    return _extreme(decisions, -1, input, dim, keepdim, other)


def _extreme(decisions: Decisions, sign: int, input: Tensor, dim: Any, keepdim: bool, other: Any) -> Any:
    """Return what `torch.max` (sign 1) or `torch.min` (sign -1) returns in its three forms."""
    other = dim if isinstance(dim, Tensor) else other
    if other is not None:
        return (_larger if sign > 0 else _smaller)(decisions, input, other)
    if dim is None:
        return _reduce(decisions, sign, input, (), False)[0]
    values, index = _reduce(decisions, sign, input, (int(dim),), keepdim)
    kind = torch.return_types.max if sign > 0 else torch.return_types.min
    return kind((values, index))


def _argmax(decisions: Decisions, input: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    return _place(decisions, 1, input, dim, keepdim)


def _argmin(decisions: Decisions, input: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    return _place(decisions, -1, input, dim, keepdim)


def _place(decisions: Decisions, sign: int, input: Tensor, dim: int | None, keepdim: bool) -> Tensor:
    """Return where the largest (smallest) entry stands: that of them which stays so along the direction."""
    if dim is not None:
        return _reduce(decisions, sign, input, (int(dim),), keepdim)[1]
    place = _reduce(decisions, sign, input, (), False)[1]
    return place.view([1] * input.dim()) if keepdim else place


def _amax(decisions: Decisions, input: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    return _reduce(decisions, 1, input, (dim,) if isinstance(dim, int) else tuple(dim), keepdim)[0]


def _amin(decisions: Decisions, input: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    return _reduce(decisions, -1, input, (dim,) if isinstance(dim, int) else tuple(dim), keepdim)[0]


def _reduce(
    decisions: Decisions, sign: int, input: Tensor, dims: tuple[int, ...], keepdim: bool
) -> tuple[Tensor, Tensor]:
    """Return the largest (smallest) entry over `dims` (over all, if empty) and its place among them."""
    if input.dim() == 0:
        return input, torch.zeros_like(input, dtype=torch.int64)
    reduced = sorted({dim % input.dim() for dim in dims}) or list(range(input.dim()))
    kept = [dim for dim in range(input.dim()) if dim not in reduced]
    moved = input.permute(*kept, *reduced)
    candidates = moved.reshape(*moved.shape[: len(kept)], -1)
    primal = sign * candidates.detach()
    tied = attains(primal, primal.amax(-1))
    place = decisions.choose_largest(tied, sign * read_tangent(candidates)).unsqueeze(-1)
    shape = (
        [1 if dim in reduced else size for dim, size in enumerate(input.shape)] if keepdim else moved.shape[: len(kept)]
    )
    return candidates.gather(-1, place).view(shape), place.view(shape)


def _pooling(make_windows: Rule, spatial: int, with_indices: bool) -> Rule:
    """Build the rule of a max-pooling."""

    def rule(decisions: Decisions, input: Tensor, *args: Any, return_indices: bool = False, **kwargs: Any) -> Any:
        # The windows' own arguments come first; torch's last positional one asks for indices.
        limit = 1 if make_windows is adaptive_windows else 5
        return_indices = with_indices or return_indices or any(args[limit:])
        windows: PoolWindows = make_windows(input, *args[:limit], **kwargs, spatial=spatial)
        entries = windows.entries(input.detach(), -torch.inf)
        tied = attains(entries, windows.pooled.view(entries.shape[:-1]))
        tangents = windows.entries(read_tangent(input), 0.0)
        positions = windows.positions(decisions.choose_largest(tied, tangents))
        pooled = windows.pick(input, positions)
        return (pooled, positions.view(pooled.shape)) if return_indices else pooled

    return rule


def _l1_loss(
    decisions: Decisions,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    if weight is not None or size_average is not None or reduce is not None:
        return NotImplemented
    difference = input - target
    distance = _choose_slopes(decisions, difference, difference.abs(), BREAKPOINTS["abs"]())
    return {"mean": distance.mean, "sum": distance.sum, "none": lambda: distance}[reduction]()


def _comparison(name: str) -> Rule:
    """Build the rule of a comparison: equal sides compare as they do a step further along the direction."""
    stock = _COMPARISONS[name]

    def rule(decisions: Decisions, input: Any, other: Any) -> Tensor:
        truth = stock(input, other)
        equal = torch.eq(input, other)
        left, right = (read_tangent(torch.as_tensor(side, device=truth.device)) for side in (input, other))
        difference = left - right
        side = decisions.choose_side(equal, torch.where(equal, difference, 0.0))
        return torch.where(equal & (side != 0), stock(side, 0.0), truth)

    return rule


_RULES: dict[str, Rule] = {
    "prelu": _prelu,
    "threshold": _threshold,
    "maximum": _larger,
    "minimum": _smaller,
    "fmax": _fmax,
    "fmin": _fmin,
    "max": _max,
    "min": _min,
    "amax": _amax,
    "amin": _amin,
    "argmax": _argmax,
    "argmin": _argmin,
    "l1_loss": _l1_loss,
    **{name: _comparison(name) for name in _COMPARISONS},
    **{
        f"{prefix}max_pool{spatial}d{suffix}": _pooling(make_windows, spatial, bool(suffix))
        for spatial in (1, 2, 3)
        for prefix, make_windows in (("", pool_windows), ("adaptive_", adaptive_windows))
        for suffix in ("", "_with_indices")
    },
}
