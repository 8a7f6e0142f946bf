"""What is kept of the errors of a random gradient while draws come in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cheapgrad.auditing._directions import MOST_BLOCKS, Directions
from cheapgrad.errors import GradientDrawError

_SIGNS_SEED = 20240229
# A difference below this many units in the last place of a tensor's largest entry is rounding, not bias; nor is one
# below the second number of units of the largest entry of all tensors: some gradients are zero but for rounding, such
# as those of the biases of keys in attention, and of convolutions before a batch norm.
_FORGIVEN_ULPS = 64
_FORGIVEN_ULPS_OF_ALL = 32


@dataclass(frozen=True)
class DrawnErrors:
    """Figures of draws; n draws in order, T tensors.

    Attributes:
        projections: shape ``[n, tests]``: of the errors, on every direction of every tensor, one tensor after another.
        along: those on the exact gradient of each tensor, shape ``[n, T]``.
        squared_errors: ``‖ĝ − g‖²``, shape ``[n, T]``.
        squared_norms: ``‖ĝ‖²``, shape ``[n, T]``.
        squared_exact: ``‖g‖²`` of the exact gradient that the draw was compared with, shape ``[n, T]``.
        inner_products: ``⟨ĝ, g⟩``, shape ``[n, T]``.
        squared_mean_errors: squared norms of the mean errors, shape ``[T]``.
        squared_mean_exact: squared norms of the means of the exact gradients, shape ``[T]``.
        squared_means: squared norms of the means of the gradients drawn, shape ``[T]``.
        varies: whether errors differ from draw to draw, shape ``[T]``.
        wrong: whether the first error is more than rounding, shape ``[T]``.
    """

    projections: Tensor
    along: Tensor
    squared_errors: Tensor
    squared_norms: Tensor
    squared_exact: Tensor
    inner_products: Tensor
    squared_mean_errors: Tensor
    squared_mean_exact: Tensor
    squared_means: Tensor
    varies: Tensor
    wrong: Tensor

    @property
    def draws(self) -> int:
        """How many gradients were drawn."""
        return len(self.projections)


class ErrorCollector:
    """Takes in gradients and keeps projections of their errors, and their sum.

    Args:
        exact_gradient: copied at once, because it may be ``.grad`` fields that the next draw overwrites.
        names: of the tensors.
        tolerance: a constant error of a tensor up to this fraction of its norm is forgiven.
        most_blocks: into how many blocks the axes of a tensor are cut at most.
        keeps_entries: whether the variance of every entry is wanted, which takes one more copy of the gradient.
    """

    def __init__(
        self,
        exact_gradient: Sequence[Tensor],
        names: Sequence[str] | None,
        tolerance: float = 0.0,
        most_blocks: int = MOST_BLOCKS,
        *,
        keeps_entries: bool = False,
    ) -> None:
        if not len(exact_gradient):
            raise GradientDrawError("the exact gradient has no tensors; give the gradient of at least one parameter")
        self.names = [str(position) for position in range(len(exact_gradient))] if names is None else list(names)
        if len(self.names) != len(exact_gradient):
            raise GradientDrawError(f"{len(self.names)} names for {len(exact_gradient)} tensors; give one for each")
        self.tolerance = tolerance
        self._check("the exact gradient", exact_gradient, [tensor.shape for tensor in exact_gradient])
        self.exact = [tensor.detach().clone() for tensor in exact_gradient]
        self.directions = [
            Directions(tensor, _SIGNS_SEED + position, most_blocks) for position, tensor in enumerate(self.exact)
        ]
        self.sizes = [tensor.numel() for tensor in self.exact]
        self.squared_norms = torch.tensor([direction.squared_norm for direction in self.directions], dtype=torch.double)
        self._check_finite("the exact gradient", self.squared_norms)
        self._units = self._rounding_units()
        self.resolutions = [
            direction.resolutions(unit, tolerance).cpu()
            for direction, unit in zip(self.directions, self._units, strict=True)
        ]
        self._keeps_entries = keeps_entries
        self._sums: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._exact_sums: list[Tensor] = []
        self._first_errors: list[Tensor] = []
        self._varies = [False] * len(self.exact)
        self._projections: list[Tensor] = []
        self._figures: list[Tensor] = []

    def _rounding_units(self) -> list[float]:
        largest = [float(tensor.abs().max()) if tensor.numel() else 0.0 for tensor in self.exact]
        return [
            torch.finfo(tensor.dtype).eps * max(_FORGIVEN_ULPS * own, _FORGIVEN_ULPS_OF_ALL * max(largest))
            for tensor, own in zip(self.exact, largest, strict=True)
        ]

    def add(self, drawn: Sequence[Tensor], where: str, exact: Sequence[Tensor] | None = None) -> None:
        """Take in one draw.

        Args:
            drawn: the gradient.
            where: what messages call it.
            exact: the exact gradient of this very draw, if it is another at every draw.
        """
        shapes = [tensor.shape for tensor in self.exact]
        self._check(where, drawn, shapes)
        if exact is not None:
            self._check(f"the exact gradient for {where}", exact, shapes)
            exact = [tensor.detach().to(mine.device) for tensor, mine in zip(exact, self.exact, strict=True)]
        own_exact = self.exact if exact is None else exact
        projections, figures = [], []
        for position, (tensor, truth) in enumerate(zip(drawn, own_exact, strict=True)):
            estimate = tensor.detach().to(truth.device, torch.promote_types(tensor.dtype, torch.float32))
            error = estimate - truth
            projections.append(self.directions[position].project(error))
            pairs = [(error, error), (estimate, estimate), (truth, truth), (estimate, truth)]
            figures.append(torch.stack([inner_product(left, right) for left, right in pairs]))
            self._note_change(position, error)
            _add_up(self._sums, position, error)
            if self._keeps_entries:
                _add_up(self._squares, position, error.square())
            if exact is not None:
                _add_up(self._exact_sums, position, truth)
        device = figures[0].device
        of_all = torch.stack([figure.to(device) for figure in figures]).cpu()
        self._check_finite(where, of_all.sum(1))
        self._projections.append(torch.cat([projection.to(device) for projection in projections]).cpu())
        self._figures.append(of_all)

    def _note_change(self, position: int, error: Tensor) -> None:
        if position == len(self._first_errors):
            self._first_errors.append(error.clone())
        elif not self._varies[position]:
            change = (error - self._first_errors[position]).abs()
            self._varies[position] = bool((change > self._units[position]).any())

    def collected(self) -> DrawnErrors:
        """Return the figures of all draws so far."""
        squared_errors, squared_norms, squared_exact, inner_products = torch.stack(self._figures).unbind(-1)
        draws = len(self._figures)
        exact_means = [total / draws for total in self._exact_sums] if self._exact_sums else self.exact
        mean_errors = [total / draws for total in self._sums]
        means = [error + exact for error, exact in zip(mean_errors, exact_means, strict=True)]
        projections = torch.stack(self._projections)
        counts = [len(resolution) for resolution in self.resolutions]
        heads = torch.tensor([0, *counts]).cumsum(0)[:-1]
        return DrawnErrors(
            projections=projections,
            along=projections[:, heads],
            squared_errors=squared_errors,
            squared_norms=squared_norms,
            squared_exact=squared_exact,
            inner_products=inner_products,
            squared_mean_errors=_squared_norms(mean_errors),
            squared_mean_exact=_squared_norms(exact_means),
            squared_means=_squared_norms(means),
            varies=torch.tensor(self._varies),
            wrong=torch.tensor([self._is_wrong(position) for position in range(len(self.exact))]),
        )

    def entry_variances(self) -> list[Tensor]:
        """Return the variance of the error of every entry; nothing where it was not to be kept."""
        if not self._keeps_entries:
            return []
        draws = len(self._figures)
        return [
            squares.addcmul(total, total, value=-1 / draws).div_(draws - 1).clamp_min_(0)
            for squares, total in zip(self._squares, self._sums, strict=True)
        ]

    def _is_wrong(self, position: int) -> bool:
        error = self._first_errors[position]
        forgiven = self.tolerance * float(self.squared_norms[position]) ** 0.5
        return bool((error.abs() > self._units[position]).any()) and float(error.double().norm()) > forgiven

    def _check(self, where: str, tensors: Sequence[Tensor | None], shapes: Sequence[torch.Size]) -> None:
        if len(tensors) != len(self.names):
            raise GradientDrawError(f"{where} has {len(tensors)} tensors, but the exact gradient has {len(self.names)}")
        for name, shape, tensor in zip(self.names, shapes, tensors, strict=True):
            if tensor is None:
                raise GradientDrawError(
                    f"{where}: tensor {name!r} is None; return zeros of shape {tuple(shape)} where there is no gradient"
                )
            if tensor.shape != shape:
                raise GradientDrawError(
                    f"{where}: tensor {name!r} has shape {tuple(tensor.shape)}, but the exact gradient has "
                    f"{tuple(shape)}"
                )

    def _check_finite(self, where: str, figures: Tensor) -> None:
        finite = figures.isfinite()
        if not bool(finite.all()):
            name = self.names[int(finite.logical_not().nonzero()[0])]
            raise GradientDrawError(
                f"{where}: tensor {name!r} has entries that are not finite; an audit needs finite ones"
            )


def _add_up(sums: list[Tensor], position: int, tensor: Tensor) -> None:
    if position == len(sums):
        sums.append(tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True))
    else:
        sums[position].add_(tensor)


def inner_product(left: Tensor, right: Tensor) -> Tensor:
    """Return the sum of the products of all entries, in double precision."""
    return torch.dot(left.flatten().double(), right.flatten().double())


def _squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    return torch.tensor([float(inner_product(tensor, tensor)) for tensor in tensors], dtype=torch.double)
