"""The record of an audit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cheapgrad.errors import (
    BiasedGradientError,
    BudgetError,
    RecordError,
    UnknownNameError,
    describe_value,
    nearest_match,
)
from cheapgrad.files import write_whole
from cheapgrad.plain_data import plain, read_record

KIND, VERSION = "cheapgrad.audit", 1
# What the verdict rests on; of the other figures infinities and nan have a meaning.
_ALLOWED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "draws": (lambda value: value >= 1, "at least 1"),
    "processes": (lambda value: value >= 1, "at least 1"),
    "tests": (lambda value: value >= 1, "at least 1"),
    "alpha": (lambda value: 0 < value < 1, "between 0 and 1"),
    "band": (lambda value: 0 < value < math.inf, "a finite number above 0"),
    "tolerance": (lambda value: 0 <= value < 1, "in [0, 1)"),
    "squared_norm": (lambda value: value >= 0, "at least 0"),
}

# Where every number of the record comes from.
PROVENANCE = {
    "relative_variance": "measured: sample variance of the gradient drawn, ÷ squared norm of the exact gradient; the "
    "model's own random numbers do not count",
    "noise_fraction": "measured: the same variance ÷ that of the mini-batch's gradient, which is estimated from the "
    "exact gradients of micro-batches",
    "preconditioned_noise_fraction": "measured: the same ratio, the variances of every entry divided by what the "
    "optimizer divides its squared gradient by",
    "max_abs_z": "measured: largest z-score of the mean error over all directions, skewness corrected",
    "band": "computed: Student's two-sided band at alpha ÷ tests",
    "scale": "measured: length of the mean gradient along the exact one, in units of that one",
    "relative_bias": "measured: length of the mean error ÷ that of the exact gradient, what variance explains removed; "
    "0 where nothing remains",
    "detectable_relative_bias": "computed: error of scale that would have been found with probability 0.99",
    "deterministic_error": "measured: the exact gradient against central differences of the loss in double precision, "
    "and the step with stock code against the reference; 0 within what these resolve",
    "held_bytes": "measured: bytes held for backward, eager",
    "backward_flops": "measured: FLOPs of the backward pass with recomputation, eager",
}


@dataclass(frozen=True)
class LayerAudit:
    """One parameter's gradient; see `AuditReport` for what the figures mean.

    Attributes:
        name: of the parameter.
        coordinates: how many entries it has.
        squared_norm: ``‖g‖²`` of its exact gradient.
        relative_variance: ``E‖ĝ − E ĝ‖² / ‖g‖²``; infinite where g is zero and ĝ is not.
        noise_fraction: added variance divided by that of the mini-batch's gradient; None if that is unknown.
        max_abs_z: largest absolute z-score; infinite where the error never changes and is no rounding, or where there
            is a `deterministic_error`.
        z_along_gradient: z-score of the error along the exact gradient.
        scale: mean length along the exact gradient; 1 is right.
        relative_bias: length of the mean error, what variance explains removed, divided by ``‖g‖``.
        detectable_relative_bias: error of scale, as a fraction, that would have been found with probability 0.99.
        cosine: mean cosine between a drawn and the exact gradient.
        deterministic_error: a relative error that is there without any sketch: of the exact gradient against the
            derivative of the loss, or of the step with the stock code of all converted layers against the reference; 0
            where none was found.
        module: the module that holds the parameter.
        held_bytes: held for backward by that module; stated with the first of its parameters, None with the others.
        exact_held_bytes: the same, in the exact step.
        backward_flops: FLOPs of that module's backward pass, likewise.
        exact_backward_flops: the same, in the exact step.
    """

    name: str
    coordinates: int
    squared_norm: float
    relative_variance: float
    noise_fraction: float | None
    max_abs_z: float
    z_along_gradient: float
    scale: float
    relative_bias: float
    detectable_relative_bias: float
    cosine: float
    deterministic_error: float
    module: str
    held_bytes: int | None = None
    exact_held_bytes: int | None = None
    backward_flops: int | None = None
    exact_backward_flops: int | None = None


@dataclass(frozen=True)
class AuditReport:
    """What an audit found; see `audit`. ``print(report)`` shows it as a table with a verdict.

    Attributes:
        subject: ``"gradient"``, or ``"step"`` for what a loop accumulates.
        draws: gradients drawn, those of all processes together.
        confirmed: whether as many draws again had to confirm an alarm of the first half.
        processes: whose draws were pooled; 1 where all have the same.
        seed: all random numbers follow from it.
        alpha: probability that an unbiased gradient is called biased, at most.
        tests: how many z-scores share `alpha` (Bonferroni).
        band: largest absolute z-score that chance explains at that level.
        tolerance: a bias up to this fraction of the gradient was accepted.
        reference: what the gradient was compared with, in words.
        derivative_checked: whether the exact gradient was checked against central differences of the loss.
        forward_noise: ``"none"``, ``"shared"`` if the model draws the same random numbers in the step and in its
            reference, ``"not shared"`` if it draws others.
        squared_norm: ``‖g‖²`` of the exact gradient.
        relative_variance: ``E‖ĝ − E ĝ‖² / ‖g‖²``, without the model's own random numbers.
        relative_variance_standard_error: standard error of that figure.
        mini_batch_relative_variance: variance of the exact gradient as that of a sample of examples, ÷ ``‖g‖²``; None
            if unknown.
        noise_fraction: added variance divided by that of the mini-batch's gradient; None if that is unknown.
        preconditioned_noise_fraction: the same in units of the optimizer's steps; None without an optimizer, or if that
            is unknown.
        max_abs_z: largest absolute z-score of all tests.
        z_along_gradient: z-score of the error of the whole gradient along the exact one.
        scale: mean length of the whole gradient along the exact one; 1 is right.
        relative_bias: length of the mean error, what variance explains removed, divided by ``‖g‖``.
        detectable_relative_bias: error of scale of the whole gradient that would have been found with probability 0.99.
        cosine: mean cosine between a drawn and the exact gradient.
        held_bytes: held for backward by the step, its loss included; None if unknown.
        exact_held_bytes: the same, in the exact step.
        backward_flops: FLOPs of the backward pass with recomputation; None if unknown.
        exact_backward_flops: the same, in the exact step.
        layers: one record for each trainable parameter, in the model's order.
        remarks: what else a reader has to know.
    """

    subject: str
    draws: int
    confirmed: bool
    processes: int
    seed: int
    alpha: float
    tests: int
    band: float
    tolerance: float
    reference: str
    derivative_checked: bool
    forward_noise: str
    squared_norm: float
    relative_variance: float
    relative_variance_standard_error: float
    mini_batch_relative_variance: float | None
    noise_fraction: float | None
    preconditioned_noise_fraction: float | None
    max_abs_z: float
    z_along_gradient: float
    scale: float
    relative_bias: float
    detectable_relative_bias: float
    cosine: float
    held_bytes: int | None
    exact_held_bytes: int | None
    backward_flops: int | None
    exact_backward_flops: int | None
    layers: tuple[LayerAudit, ...]
    remarks: tuple[str, ...] = ()

    @property
    def unbiased(self) -> bool:
        """Whether every z-score lies within the band; what could have hidden there is `detectable_relative_bias`."""
        return self.max_abs_z <= self.band

    @property
    def biased_layers(self) -> tuple[LayerAudit, ...]:
        """The parameters with a z-score beyond the band, the largest first."""
        beyond = [layer for layer in self.layers if not layer.max_abs_z <= self.band]
        return tuple(sorted(beyond, key=lambda layer: -layer.max_abs_z))

    def layer(self, name: str) -> LayerAudit:
        """Return the record of a parameter.

        Args:
            name: its qualified name.

        Raises:
            UnknownNameError: there is none of that name; the message names the nearest one.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        names = [layer.name for layer in self.layers]
        raise UnknownNameError(f"the audit has no parameter {name!r}{nearest_match(name, names)}")

    def draws_needed(self, relative_bias: float) -> int:
        """Return about how many draws would show an error of scale in every parameter.

        Args:
            relative_bias: as a fraction, e.g. 0.01.

        Returns:
            At least 8. Modelled: standard errors fall with the square root of the number of draws.

        Raises:
            BudgetError: the fraction is not positive.
        """
        if not relative_bias > 0:
            raise BudgetError(f"relative_bias must be a positive fraction, but got {relative_bias!r}; use e.g. 0.01")
        visible = [layer.detectable_relative_bias for layer in self.layers if layer.squared_norm > 0]
        worst = max(visible, default=0.0)
        first_draws = self.draws // 2 if self.confirmed else self.draws
        return max(8, math.ceil(first_draws * (worst / relative_bias) ** 2))

    def assert_unbiased(self, *, within: float | None = None) -> None:
        """Raise unless the gradient is unbiased; for test suites.

        Args:
            within: also raise where an error of scale of the whole gradient of this fraction could have hidden.

        Raises:
            BiasedGradientError: it is biased, or was measured too coarsely.
        """
        if not self.unbiased:
            raise BiasedGradientError(self.verdict())
        if within is not None and not self.detectable_relative_bias <= within:
            needed = math.ceil(self.draws * (self.detectable_relative_bias / within) ** 2)
            raise BiasedGradientError(
                f"no bias found, but {self.draws} draws would not have shown an error of scale below "
                f"{self.detectable_relative_bias:.2g}, and {within:g} was asked for; use about {needed} draws"
            )

    def verdict(self) -> str:
        """Return what was found in one sentence or two."""
        from cheapgrad.auditing._table import write_verdict

        return write_verdict(self)

    def table(self, top: int | None = 40) -> str:
        """Return the figures of the parameters as a table.

        Args:
            top: number of lines, those with the largest z-scores; None for all.
        """
        from cheapgrad.auditing._table import render_audit

        return render_audit(self, top)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for strict JSON, marked as what it is; infinities become ``"inf"``."""
        data = {"kind": KIND, "version": VERSION, **asdict(self), "unbiased": self.unbiased, "verdict": self.verdict()}
        return plain({**data, "provenance": PROVENANCE})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AuditReport:
        """Return the report that `to_dict` was called on.

        Args:
            data: what it returned, also after a journey through JSON.

        Raises:
            RecordError: the data are no report, or a damaged one; the message names the field.
        """
        if not isinstance(data, Mapping) or "kind" not in data:
            raise RecordError(f"this is no audit: it should say 'kind': {KIND!r}, but is {describe_value(data)}")
        # Reports that were written before there was such a figure do not have it.
        data = {"preconditioned_noise_fraction": None, **data}
        report = read_record(cls, data, kind=KIND, version=VERSION)
        for name, (is_allowed, allowed) in _ALLOWED.items():
            if not is_allowed(getattr(report, name)):
                raise RecordError(f"{name} must be {allowed}, but is {getattr(report, name)!r}; write the report again")
        return report

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, whole or not at all.

        Args:
            path: of the file; one that is there is replaced.

        Raises:
            OutputError: it cannot be written; an older file of that name is untouched.
        """
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        write_whole(Path(path), (text + "\n").encode())
