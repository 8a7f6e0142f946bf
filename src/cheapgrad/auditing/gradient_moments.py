"""Bias and variance of a random gradient, from a fixed number of draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.auditing._streaming import LARGEST_TESTABLE_SKEWNESS, StreamingMoments
from cheapgrad.auditing.student import student_band
from cheapgrad.errors import BudgetError, GradientDrawError, check_count

# Random directions on which the bias is projected, beside the direction of the gradient itself.
_DIRECTIONS = 8
_DIRECTION_SEED = 20240229
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
        max_abs_z: largest absolute z-score of its entries and of its projections.
        z_along_gradient: z-score of the projection on the exact gradient.
        tested_coordinates: entries that were tested on their own.
        undecided_coordinates: entries whose draws are too rare or too skewed for a test of their own.
        undecided_relative_bias: norm of the mean error on entries that never changed, divided by ``‖g‖``.
        detectable_relative_bias: error of scale, as a fraction, that would have been found with probability 0.99.
    """

    name: str
    coordinates: int
    squared_norm: float
    relative_variance: float
    max_abs_z: float
    z_along_gradient: float
    tested_coordinates: int
    undecided_coordinates: int
    undecided_relative_bias: float
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
        return {**_finite(asdict(self)), "unbiased": self.unbiased}


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

    For every entry, with ``d_i`` the error of draw i and n draws, ``z = d̄ / (s / √n)`` is compared with the two-sided
    Student band at ``alpha / tests``. Besides the entries, the projections of each tensor, and of the whole gradient,
    on the exact gradient and on eight fixed random sign vectors are tested: a bias spread thinly over many entries adds
    up there, and sums of many entries are close to normal where single entries are not.

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
        The relative variance is unbiased. False alarms stay below `alpha` as far as the means of the draws are near
        normal; so entries whose draws are strongly skewed (|skewness| > 3: less than one draw in twelve contributes)
        are left to the projections and counted as undecided, z-scores are corrected for the skewness that is left, and
        a tensor that never changes must equal the exact one to within rounding. A bias confined to undecided entries
        can go unseen; `undecided_relative_bias` is the error on those of them that never changed. Memory: about 150
        bytes for each entry; only a few numbers for each tensor grow with `draws`.

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
        self.exact_P = self._join(exact_gradient, "the exact gradient")
        self.squared_norms = [float(part.square().sum()) for part in self.split(self.exact_P)]
        self.resolutions = [
            _FORGIVEN_ULPS * torch.finfo(tensor.dtype).eps * float(tensor.abs().max()) if tensor.numel() else 0.0
            for tensor in exact_gradient
        ]
        self.resolution_P = torch.cat(
            [
                torch.full((size,), unit, dtype=torch.float64)
                for size, unit in zip(self.sizes, self.resolutions, strict=True)
            ]
        ).to(self.device)
        generator = torch.Generator().manual_seed(_DIRECTION_SEED)
        coins = torch.randint(0, 2, (_DIRECTIONS, self.exact_P.numel()), generator=generator)
        self.signs = (2 * coins - 1).to(self.device, torch.float32)
        self.entries = StreamingMoments(self.exact_P.shape, self.device)
        # One row for each tensor: its squared error, its projection on the exact gradient, those on random signs.
        self.figures: list[Tensor] = []

    def add(self, drawn: Sequence[Tensor], where: str) -> None:
        if len(drawn) != len(self.names):
            raise GradientDrawError(f"{where} has {len(drawn)} tensors, but the exact gradient has {len(self.names)}")
        error_P = self._join(drawn, where) - self.exact_P
        self.entries.add(error_P)
        squared = torch.stack([part.sum() for part in self.split(error_P.square())])
        along = torch.stack([part.sum() for part in self.split(error_P * self.exact_P)])
        signed = [
            part @ signs.T for part, signs in zip(self.split(error_P.float()), self.split(self.signs), strict=True)
        ]
        self.figures.append(torch.cat([torch.stack([squared, along], dim=1), torch.stack(signed)], dim=1).cpu())

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Split the last axis, of all entries, into one part for each tensor."""
        return tensor.split(self.sizes, dim=-1)

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
            part = tensor.detach().to(self.device, torch.float64).flatten()
            if not bool(part.isfinite().all()):
                count = int((~part.isfinite()).sum())
                raise GradientDrawError(
                    f"{where}: tensor {name!r} has {count} entries that are not finite; an audit needs finite gradients"
                )
            parts.append(part)
        return torch.cat(parts)


@dataclass(frozen=True)
class _Entries:
    """What the entries of one tensor say, before the band is known."""

    max_abs_z: float
    tested: int
    undecided: int
    squared_frozen_error: float


def _test_entries(audit: _Audit) -> list[_Entries]:
    moments = audit.entries
    varies_P = (moments.squares / moments.count).sqrt() > audit.resolution_P
    testable_P = varies_P & (moments.skewness.abs() <= LARGEST_TESTABLE_SKEWNESS)
    wrong_P = moments.mean.abs() > audit.resolution_P
    z_P = moments.z_scores(audit.resolution_P)
    results = []
    by_tensor = map(audit.split, (varies_P, testable_P, wrong_P, z_P, moments.mean))
    for varies, testable, wrong, z, mean in zip(*by_tensor, strict=True):
        if not bool(varies.any()):
            # Nothing here is random, so it has to be right.
            results.append(_Entries(math.inf if bool(wrong.any()) else 0.0, 0, 0, 0.0))
            continue
        frozen = ~varies & wrong
        undecided = int((varies & ~testable).sum() + frozen.sum())
        largest = float(z[testable].abs().max()) if bool(testable.any()) else 0.0
        results.append(_Entries(largest, int(testable.sum()), undecided, float(mean[frozen].square().sum())))
    return results


@dataclass(frozen=True)
class _Projections:
    """Z-scores of the projections, the one on the exact gradient first, and the standard error of that one."""

    z: Tensor
    standard_error_along: float

    @property
    def max_abs_z(self) -> float:
        return float(self.z.abs().max())


def _test_projections(audit: _Audit, positions: Sequence[int]) -> _Projections:
    """Test the projections of the tensors at `positions`, taken together."""
    chosen = list(positions)
    series = torch.stack(audit.figures)[:, chosen, 1:].sum(dim=1)
    moments = StreamingMoments(series[0].shape, series.device)
    for value in series:
        moments.add(value)
    # Rounding errors of different entries are taken as independent, so those of a projection add up in squares.
    along = math.sqrt(sum(audit.resolutions[i] ** 2 * audit.squared_norms[i] for i in chosen))
    signed = math.sqrt(sum(audit.resolutions[i] ** 2 * audit.sizes[i] for i in chosen))
    resolution = torch.tensor([along] + [signed] * _DIRECTIONS, dtype=torch.float64)
    return _Projections(moments.z_scores(resolution), float(moments.standard_error[0]))


def _summarise(audit: _Audit, draws: int, alpha: float) -> GradientMoments:
    entries = _test_entries(audit)
    everything = range(len(audit.names))
    tests = sum(found.tested for found in entries) + (1 + _DIRECTIONS) * (len(entries) + 1)
    band = student_band(alpha / tests, draws - 1)
    tensors = tuple(_summarise_tensor(audit, position, entries[position], band) for position in everything)
    projections = _test_projections(audit, everything)
    squared_norm = sum(audit.squared_norms)
    squared_errors = torch.stack(audit.figures)[:, :, 0].sum(dim=1)
    return GradientMoments(
        draws=draws,
        alpha=alpha,
        tests=tests,
        band=band,
        squared_norm=squared_norm,
        relative_variance=_relative(float(squared_errors.mean()), squared_norm),
        relative_variance_standard_error=_relative(float(squared_errors.std()) / math.sqrt(draws), squared_norm),
        max_abs_z=max([projections.max_abs_z, *(tensor.max_abs_z for tensor in tensors)]),
        z_along_gradient=float(projections.z[0]),
        detectable_relative_bias=_detectable(len(audit.figures), band, projections, squared_norm),
        tensors=tensors,
    )


def _summarise_tensor(audit: _Audit, position: int, entries: _Entries, band: float) -> TensorMoments:
    projections = _test_projections(audit, [position])
    squared_norm = audit.squared_norms[position]
    squared_error = float(torch.stack(audit.figures)[:, position, 0].mean())
    return TensorMoments(
        name=audit.names[position],
        coordinates=audit.sizes[position],
        squared_norm=squared_norm,
        relative_variance=_relative(squared_error, squared_norm),
        max_abs_z=max(entries.max_abs_z, projections.max_abs_z),
        z_along_gradient=float(projections.z[0]),
        tested_coordinates=entries.tested,
        undecided_coordinates=entries.undecided,
        undecided_relative_bias=math.sqrt(_relative(entries.squared_frozen_error, squared_norm)),
        detectable_relative_bias=_detectable(len(audit.figures), band, projections, squared_norm),
    )


def _detectable(draws: int, band: float, projections: _Projections, squared_norm: float) -> float:
    # A bias beyond the band by this margin is found 99 times in 100: besides the mean, the standard error is itself
    # estimated, here and in the audit that has to find the bias.
    margin = _NORMAL_99 * math.sqrt(1 + band**2 / (draws - 1))
    return _relative((band + margin) * projections.standard_error_along, squared_norm)


def _relative(value: float, squared_norm: float) -> float:
    if squared_norm > 0:
        return value / squared_norm
    return math.inf if value > 0 else 0.0


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
