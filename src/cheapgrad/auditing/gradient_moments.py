"""Bias and variance of a random gradient, from a fixed number of draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.auditing._mean_test import mean_z_scores, standard_errors
from cheapgrad.auditing.student import student_band
from cheapgrad.errors import BudgetError, GradientDrawError, check_count

# Into how many groups the entries of a tensor are dealt, and how many entries a group has at least: few enough for a
# bias in a corner to show, enough for a sum to be near normal.
_MOST_GROUPS = 32
_LEAST_GROUP = 64
_DEALING_SEED = 20240229
# A difference below this many units in the last place of a tensor's largest entry is rounding, not bias.
_FORGIVEN_ULPS = 64
# One-sided 99 % point of the normal distribution.
_NORMAL_99 = 2.33


@dataclass(frozen=True)
class TensorMoments:
    """Bias and variance of one tensor of the gradient; see `measure_gradient_moments`.

    Attributes:
        name: of the tensor.
        coordinates: how many entries it has.
        squared_norm: ``‖g‖²`` of the exact gradient.
        relative_variance: ``E‖ĝ − g‖² / ‖g‖²``; infinite where g is zero and ĝ is not.
        max_abs_z: largest absolute z-score of its projections; infinite if it never changes and is wrong.
        z_along_gradient: z-score of the projection on the exact gradient.
        detectable_relative_bias: error of scale, as a fraction, that would have been found with probability 0.99.
    """

    name: str
    coordinates: int
    squared_norm: float
    relative_variance: float
    max_abs_z: float
    z_along_gradient: float
    detectable_relative_bias: float


@dataclass(frozen=True)
class GradientMoments:
    """Bias and variance of a random gradient; see `measure_gradient_moments`.

    Attributes:
        draws: gradients drawn, fixed beforehand.
        alpha: probability that an unbiased gradient is called biased, over all tests together.
        tests: how many tests share `alpha` (Bonferroni).
        band: largest absolute z-score that chance explains at that level.
        squared_norm: ``‖g‖²`` of the exact gradient.
        relative_variance: ``E‖ĝ − g‖² / ‖g‖²``.
        relative_variance_standard_error: standard error of that figure.
        max_abs_z: largest absolute z-score of all tests; infinite where a tensor never changes and is wrong.
        z_along_gradient: z-score of the projection of the whole gradient on the exact one.
        detectable_relative_bias: error of scale, as a fraction, that would have been found with probability 0.99.
        tensors: the same, tensor by tensor.
    """

    draws: int
    alpha: float
    tests: int
    band: float
    squared_norm: float
    relative_variance: float
    relative_variance_standard_error: float
    max_abs_z: float
    z_along_gradient: float
    detectable_relative_bias: float
    tensors: tuple[TensorMoments, ...]

    @property
    def unbiased(self) -> bool:
        """Whether every z-score lies within the band; what could have hidden there is `detectable_relative_bias`."""
        return self.max_abs_z <= self.band

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain lists and numbers, ready for JSON; infinities become ``"inf"``."""
        return {**_plain(asdict(self)), "unbiased": self.unbiased}


def measure_gradient_moments(
    draw_gradient: Callable[[], Sequence[Tensor]],
    exact_gradient: Sequence[Tensor],
    *,
    draws: int = 256,
    alpha: float = 1e-6,
    names: Sequence[str] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> GradientMoments:
    """Draw a random gradient a fixed number of times and compare its moments with the exact gradient.

    With ``d_i`` the error of draw i and n draws, the mean of ``⟨u, d_i⟩`` over its standard error is compared with the
    two-sided Student band at ``alpha / tests``, for these directions u: the exact gradient, of each tensor and as a
    whole, and random signs on each of up to 32 groups into which the entries of each tensor are dealt at random.

    Args:
        draw_gradient: no arguments; returns the tensors of one random gradient, drawn independently of the others.
        exact_gradient: the tensors that they should equal on average, in the same order; copied at once.
        draws: how many gradients to draw, at least 8. There is no early stop.
        alpha: probability that an unbiased gradient is called biased, over all tests together, in (0, 1).
        names: of the tensors, for the report; by default their positions.
        progress: called after each draw with the number done and the total.

    Returns:
        Relative variance, z-scores, their band and what bias would have been seen, in total and for each tensor.

    Law:
        The relative variance is unbiased. False alarms stay below `alpha` as far as the means of the projections are
        near normal, skewness being corrected for. Entries are not tested one by one, because that does not hold for
        them: an entry may live on an event that comes once in a thousand draws, and 256 draws that miss it look like a
        tight distribution around a wrong mean (a z-score of 246 was seen for an unbiased codec). A tensor that never
        changes must equal the exact one to within rounding. Memory: about 60 bytes for each entry; only a few numbers
        for each tensor grow with `draws`.

    Raises:
        GradientDrawError: a draw does not fit the exact gradient in number, presence or shape, or is not finite.
        BudgetError: too few draws, or `alpha` outside (0, 1).

    Example:
        >>> import torch
        >>> exact = torch.ones(1000)
        >>> generator = torch.Generator().manual_seed(0)
        >>> def keep_half():
        ...     return [exact * 2 * (torch.rand(1000, generator=generator) < 0.5)]
        >>> moments = measure_gradient_moments(keep_half, [exact])
        >>> moments.unbiased, round(moments.relative_variance, 1)
        (True, 1.0)

    References:
        P. Hall, "On the removal of skewness by transformation", J. R. Statist. Soc. B 54 (1992), for the correction.
    """
    check_count("draws", draws, minimum=8)
    if not 0 < alpha < 1:
        raise BudgetError(f"alpha must be in (0, 1), but got {alpha!r}; use e.g. 1e-6")
    audit = _Audit(exact_gradient, names)
    for draw in range(draws):
        audit.add(draw_gradient(), f"draw {draw + 1}")
        if progress is not None:
            progress(draw + 1, draws)
    return _summarise(audit, draws, alpha)


class _Audit:
    """What is kept while draws come in: the tensors stand one behind the other in a single vector."""

    def __init__(self, exact_gradient: Sequence[Tensor], names: Sequence[str] | None) -> None:
        if not len(exact_gradient):
            raise GradientDrawError("the exact gradient has no tensors; give the gradient of at least one parameter")
        self.names = [str(position) for position in range(len(exact_gradient))] if names is None else list(names)
        if len(self.names) != len(exact_gradient):
            raise GradientDrawError(f"{len(self.names)} names for {len(exact_gradient)} tensors; give one for each")
        self.shapes = [tensor.shape for tensor in exact_gradient]
        self.sizes = [tensor.numel() for tensor in exact_gradient]
        self.device = exact_gradient[0].device
        # The concatenation is a copy: the caller's tensors may be `.grad` fields that the next draw overwrites.
        self.exact = self._join(exact_gradient, "the exact gradient")
        squared_norms = torch.stack([part.square().sum() for part in self.split(self.exact)])
        self._check_finite(squared_norms, "the exact gradient")
        self.squared_norms = squared_norms.tolist()
        self.resolutions = [
            _FORGIVEN_ULPS * torch.finfo(tensor.dtype).eps * float(tensor.abs().max()) if tensor.numel() else 0.0
            for tensor in exact_gradient
        ]
        self._deal_groups()
        self.first_error: Tensor | None = None
        self.varies = [False] * len(self.sizes)
        # Of each draw: squared error and projection on the exact gradient, by tensor; signed sums, by group.
        self.figures: list[Tensor] = []
        self.group_sums: list[Tensor] = []

    def _deal_groups(self) -> None:
        """Deal the entries of each tensor into groups, and give each a random sign."""
        self.group_counts = [max(1, min(_MOST_GROUPS, size // _LEAST_GROUP)) for size in self.sizes]
        generator = torch.Generator().manual_seed(_DEALING_SEED)
        dealt, first = [], 0
        for size, count in zip(self.sizes, self.group_counts, strict=True):
            dealt.append(first + torch.randint(0, count, (size,), generator=generator))
            first += count
        self.group_of = torch.cat(dealt).to(self.device)
        coins = torch.randint(0, 2, self.group_of.shape, generator=generator)
        self.sign = (2 * coins - 1).to(self.device, torch.float64)

    def add(self, drawn: Sequence[Tensor], where: str) -> None:
        if len(drawn) != len(self.names):
            raise GradientDrawError(f"{where} has {len(drawn)} tensors, but the exact gradient has {len(self.names)}")
        error = self._join(drawn, where) - self.exact
        squared = torch.stack([part.sum() for part in self.split(error.square())])
        self._check_finite(squared, where)
        along = torch.stack([part.sum() for part in self.split(error * self.exact)])
        self.figures.append(torch.stack([squared, along]).cpu())
        sums = torch.bincount(self.group_of, weights=error * self.sign, minlength=sum(self.group_counts))
        self.group_sums.append(sums.cpu())
        if self.first_error is None:
            self.first_error = error
        elif not all(self.varies):
            changes = self.split((error - self.first_error).abs())
            self.varies = [
                varies or bool((change > unit).any())
                for varies, change, unit in zip(self.varies, changes, self.resolutions, strict=True)
            ]

    def split(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Split a vector of all entries into one part for each tensor."""
        return vector.split(self.sizes)

    def largest_z(self, position: int, z: Tensor) -> float:
        """Return the largest of a tensor's z-scores; infinity if it never changed and is not the exact one."""
        if not self.varies[position] and self.first_error is not None:
            error = self.split(self.first_error)[position]
            return math.inf if bool((error.abs() > self.resolutions[position]).any()) else 0.0
        return float(z.abs().max())

    def resolutions_of_tests(self) -> Tensor:
        """Return how large a projection rounding explains, for the whole gradient, each tensor and each group.

        Rounding errors of different entries are taken as independent, so those of a sum add up in squares.
        """
        units = torch.tensor(self.resolutions, dtype=torch.float64)
        squares_of_tensors = units.square() * torch.tensor(self.squared_norms, dtype=torch.float64)
        members = torch.bincount(self.group_of.cpu(), minlength=sum(self.group_counts))
        squares_of_groups = members * units.square().repeat_interleave(torch.tensor(self.group_counts))
        return torch.cat([squares_of_tensors.sum().view(1), squares_of_tensors, squares_of_groups]).sqrt()

    def _join(self, tensors: Sequence[Tensor | None], where: str) -> Tensor:
        parts = []
        for name, shape, tensor in zip(self.names, self.shapes, tensors, strict=True):
            if tensor is None:
                raise GradientDrawError(
                    f"{where}: tensor {name!r} is None; return zeros of shape {tuple(shape)} where there is no gradient"
                )
            if tensor.shape != shape:
                raise GradientDrawError(
                    f"{where}: tensor {name!r} has shape {tuple(tensor.shape)}, "
                    f"but the exact gradient has {tuple(shape)}"
                )
            parts.append(tensor.detach().to(self.device, torch.float64).flatten())
        return torch.cat(parts)

    def _check_finite(self, squared_norms: Tensor, where: str) -> None:
        if bool(squared_norms.isfinite().all()):
            return
        name = self.names[int(squared_norms.isfinite().logical_not().nonzero()[0])]
        raise GradientDrawError(f"{where}: tensor {name!r} has entries that are not finite; an audit needs finite ones")


def _summarise(audit: _Audit, draws: int, alpha: float) -> GradientMoments:
    squared, along = torch.stack(audit.figures, dim=1)
    # A column for each test: the whole gradient, every tensor, every group.
    series = torch.cat([along.sum(1, keepdim=True), along, torch.stack(audit.group_sums)], dim=1)
    z_scores = mean_z_scores(series, audit.resolutions_of_tests())
    errors = standard_errors(series)
    tests = series.shape[1]
    band = student_band(alpha / tests, draws - 1)
    # A bias beyond the band by this margin is found 99 times in 100: besides the mean, the standard error is itself
    # estimated, here and in the audit that has to find the bias.
    reach = band + _NORMAL_99 * math.sqrt(1 + band**2 / (draws - 1))

    group_z = z_scores[1 + len(audit.names) :].split(audit.group_counts)
    tensors = tuple(
        TensorMoments(
            name=name,
            coordinates=audit.sizes[position],
            squared_norm=audit.squared_norms[position],
            relative_variance=_relative(float(squared[:, position].mean()), audit.squared_norms[position]),
            max_abs_z=audit.largest_z(position, torch.cat([z_scores[1 + position].view(1), group_z[position]])),
            z_along_gradient=float(z_scores[1 + position]),
            detectable_relative_bias=_relative(reach * float(errors[1 + position]), audit.squared_norms[position]),
        )
        for position, name in enumerate(audit.names)
    )
    squared_norm = sum(audit.squared_norms)
    squared_errors = squared.sum(1)
    return GradientMoments(
        draws=draws,
        alpha=alpha,
        tests=tests,
        band=band,
        squared_norm=squared_norm,
        relative_variance=_relative(float(squared_errors.mean()), squared_norm),
        relative_variance_standard_error=_relative(float(squared_errors.std()) / math.sqrt(draws), squared_norm),
        max_abs_z=max([abs(float(z_scores[0])), *(tensor.max_abs_z for tensor in tensors)]),
        z_along_gradient=float(z_scores[0]),
        detectable_relative_bias=_relative(reach * float(errors[0]), squared_norm),
        tensors=tensors,
    )


def _relative(value: float, squared_norm: float) -> float:
    if squared_norm > 0:
        return value / squared_norm
    return math.inf if value > 0 else 0.0


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
