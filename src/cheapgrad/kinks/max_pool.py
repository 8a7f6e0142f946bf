"""Max-pooling with a chosen rule for ties."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cheapgrad.errors import ConventionError
from cheapgrad.kinks._windows import PoolWindows, adaptive_windows, pool_windows
from cheapgrad.kinks.ties import Ties

Sizes = int | Sequence[int]


def max_pool1d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    ties: Ties = Ties.FIRST,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return `torch.nn.functional.max_pool1d` with the rule `ties`; see `max_pool2d`."""
    windows = pool_windows(input, kernel_size, stride, padding, dilation, ceil_mode, spatial=1)
    return pool_over(input, windows, ties, return_indices)


def max_pool2d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    ties: Ties = Ties.FIRST,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return `torch.nn.functional.max_pool2d` with a chosen rule for windows whose largest entry is not alone.

    ``y = max x_z`` over the entries z of a window. A window with t > 1 largest entries sends its cotangent g to the
    first of them, to the last, or g/t to each. Arguments before `ties` are torch's own, values too.

    Args:
        input: ``[..., H, W]``, floating point.
        kernel_size: extent of the window.
        stride: step of the window; by default its extent.
        padding: rows and columns added at each edge; never the largest.
        dilation: step between the entries of a window.
        ceil_mode: whether a last window may reach over the edge.
        return_indices: whether to return flat positions too; under `Ties.EVEN` that of the first largest entry.
        ties: who receives the cotangent.

    Returns:
        The pooled image, and the positions if asked for.

    Law:
        Values are torch's, bit for bit. The gradient equals torch's wherever no window has a tie. It costs Z times the
        memory of the output for a moment, Z being the entries of a window: meant for studies, not for speed.

    Raises:
        ConventionError: `ties` is not a member of `Ties`.

    Example:
        >>> image = torch.zeros(1, 1, 2, 2, requires_grad=True)
        >>> max_pool2d(image, 2, ties=Ties.EVEN).backward()
        >>> image.grad.flatten()
        tensor([0.2500, 0.2500, 0.2500, 0.2500])

    References:
        Boustany, "On the numerical reliability of nonsmooth autodiff: a MaxPool case study", TMLR 2024, which compares
        torch's rule with the even one.
    """
    windows = pool_windows(input, kernel_size, stride, padding, dilation, ceil_mode, spatial=2)
    return pool_over(input, windows, ties, return_indices)


def max_pool3d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    ties: Ties = Ties.FIRST,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return `torch.nn.functional.max_pool3d` with the rule `ties`; see `max_pool2d`."""
    windows = pool_windows(input, kernel_size, stride, padding, dilation, ceil_mode, spatial=3)
    return pool_over(input, windows, ties, return_indices)


def adaptive_max_pool1d(
    input: Tensor, output_size: Sizes, return_indices: bool = False, *, ties: Ties = Ties.FIRST
) -> Tensor | tuple[Tensor, Tensor]:
    """Return `torch.nn.functional.adaptive_max_pool1d` with the rule `ties`; see `max_pool2d`."""
    return pool_over(input, adaptive_windows(input, output_size, spatial=1), ties, return_indices)


def adaptive_max_pool2d(
    input: Tensor, output_size: Sizes, return_indices: bool = False, *, ties: Ties = Ties.FIRST
) -> Tensor | tuple[Tensor, Tensor]:
    """Return `torch.nn.functional.adaptive_max_pool2d` with the rule `ties`; see `max_pool2d`."""
    return pool_over(input, adaptive_windows(input, output_size, spatial=2), ties, return_indices)


def adaptive_max_pool3d(
    input: Tensor, output_size: Sizes, return_indices: bool = False, *, ties: Ties = Ties.FIRST
) -> Tensor | tuple[Tensor, Tensor]:
    """Return `torch.nn.functional.adaptive_max_pool3d` with the rule `ties`; see `max_pool2d`."""
    return pool_over(input, adaptive_windows(input, output_size, spatial=3), ties, return_indices)


def pool_over(image: Tensor, windows: PoolWindows, ties: Ties, return_indices: bool) -> Tensor | tuple[Tensor, Tensor]:
    """Return the largest entry of every window, its cotangent going where `ties` says."""
    check_ties(ties)
    with torch.no_grad():
        entries = windows.entries(image.detach(), -torch.inf)
        largest = attains(entries, windows.pooled.view(entries.shape[:-1]))
        chosen = last_true(largest) if ties is Ties.LAST else first_true(largest)
        positions = windows.positions(chosen)
    if ties is Ties.EVEN:
        # `amax` shares the cotangent evenly.
        pooled = windows.entries(image, -torch.inf).amax(-1).view(windows.pooled.shape)
    else:
        pooled = windows.pick(image, positions)
    return (pooled, positions.view(pooled.shape)) if return_indices else pooled


def check_ties(ties: object) -> None:
    """Raise `ConventionError` unless `ties` is a rule."""
    if not isinstance(ties, Ties):
        rules = ", ".join(str(rule) for rule in Ties)
        raise ConventionError(f"a rule for ties must be one of {rules}, but got {ties!r}")


def attains(candidates: Tensor, extreme: Tensor) -> Tensor:
    """Return which of the last axis' candidates equal the extreme value; NaN equals NaN here."""
    return (candidates == extreme.unsqueeze(-1)) | candidates.isnan()


def first_true(mask: Tensor) -> Tensor:
    """Return the place of the first true entry along the last axis."""
    places = torch.arange(mask.shape[-1], device=mask.device)
    # The bound matters only where nothing is true, which a maximum never leads to.
    return torch.where(mask, places, mask.shape[-1] - 1).amin(-1)


def last_true(mask: Tensor) -> Tensor:
    """Return the place of the last true entry along the last axis."""
    return torch.where(mask, torch.arange(mask.shape[-1], device=mask.device), 0).amax(-1)
