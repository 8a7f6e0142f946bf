"""From what an audit found to its report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.auditing._costs import StepCosts
from cheapgrad.auditing._derivative_check import DerivativeCheck
from cheapgrad.auditing._errors_drawn import DrawnErrors
from cheapgrad.auditing._judgement import Judgement
from cheapgrad.auditing._mini_batch import MiniBatchNoise
from cheapgrad.auditing._relative import relative
from cheapgrad.auditing._step import Step
from cheapgrad.auditing.preconditioned_noise import PreconditionedNoise
from cheapgrad.auditing.report import AuditReport, LayerAudit

# The mean noise fraction of single parameters that is worth a remark, and by how much it has to exceed that of all.
_NOTICED, _HIDDEN = 0.02, 2.0


@dataclass(frozen=True)
class Findings:
    """Everything an audit has measured.

    Attributes:
        step: what was audited.
        settings: fields of the report that the caller chose.
        sizes: of the tensors.
        errors: of all draws of all processes.
        judgement: on them.
        squared_norms: of the exact gradient, shape ``[T]``.
        processes: whose draws these are.
        confirmed: whether an alarm was put to the test.
        check: of the exact gradient.
        mini_batch: noise of the mini-batch.
        forward_noise: see the report.
        costs: of the step.
        preconditioned: noise in units of an optimizer's steps, where there is one.
    """

    step: Step
    settings: dict[str, Any]
    sizes: list[int]
    errors: DrawnErrors
    judgement: Judgement
    squared_norms: Tensor
    processes: int
    confirmed: bool
    check: DerivativeCheck
    mini_batch: MiniBatchNoise
    forward_noise: str
    costs: StepCosts
    preconditioned: PreconditionedNoise


def write_report(findings: Findings) -> AuditReport:
    """Return the report."""
    errors, judgement, costs = findings.errors, findings.judgement, findings.costs
    added = _added_variances(errors, findings.processes, shared=findings.forward_noise != "not shared")
    bias = _squared_biases(errors, findings.processes)
    squared_norm = float(findings.squared_norms.sum())
    total_errors = errors.squared_errors.sum(1)
    noise = findings.mini_batch.variances
    layers = _write_layers(findings, added, bias)
    return AuditReport(
        **findings.settings,
        subject="step" if findings.step.accumulates else "gradient",
        draws=errors.draws,
        confirmed=findings.confirmed,
        processes=findings.processes,
        tests=judgement.tests,
        band=judgement.band,
        reference=_name_reference(findings),
        derivative_checked=findings.check.done,
        forward_noise=findings.forward_noise,
        squared_norm=squared_norm,
        relative_variance=relative(float(added.sum()), squared_norm),
        relative_variance_standard_error=relative(float(total_errors.std()) / math.sqrt(errors.draws), squared_norm),
        mini_batch_relative_variance=None if noise is None else relative(float(noise.sum()), squared_norm),
        noise_fraction=None if noise is None else relative(float(added.sum()), float(noise.sum())),
        preconditioned_noise_fraction=findings.preconditioned.fraction,
        max_abs_z=max([judgement.max_abs_z, *(layer.max_abs_z for layer in layers)]),
        z_along_gradient=float(judgement.along[0]),
        scale=_scale(errors.along.sum(1), squared_norm),
        relative_bias=math.sqrt(relative(float(bias.sum().clamp_min(0)), squared_norm)),
        detectable_relative_bias=relative(float(judgement.reach[0]), squared_norm),
        cosine=_cosine(errors.inner_products.sum(1), errors.squared_norms.sum(1), errors.squared_exact.sum(1)),
        held_bytes=costs.figure("audited", None, "saved_bytes"),
        exact_held_bytes=costs.figure("exact", None, "saved_bytes"),
        backward_flops=costs.figure("audited", None, "backward_flops"),
        exact_backward_flops=costs.figure("exact", None, "backward_flops"),
        layers=layers,
        remarks=_write_remarks(findings, added),
    )


def _write_layers(findings: Findings, added: Tensor, bias: Tensor) -> tuple[LayerAudit, ...]:
    errors, judgement, noise = findings.errors, findings.judgement, findings.mini_batch.variances
    wrong = dict(findings.check.wrong)
    layers, seen = [], set()
    for position, name in enumerate(findings.step.names):
        squared_norm = float(findings.squared_norms[position])
        module = name.rpartition(".")[0]
        costs = findings.costs if module not in seen else StepCosts()
        seen.add(module)
        layers.append(
            LayerAudit(
                name=name,
                coordinates=findings.sizes[position],
                squared_norm=squared_norm,
                relative_variance=relative(float(added[position]), squared_norm),
                noise_fraction=None if noise is None else relative(float(added[position]), float(noise[position])),
                max_abs_z=math.inf if name in wrong else float(judgement.largest[position]),
                z_along_gradient=float(judgement.along[1 + position]),
                scale=_scale(errors.along[:, position], squared_norm),
                relative_bias=math.sqrt(relative(float(bias[position].clamp_min(0)), squared_norm)),
                detectable_relative_bias=relative(float(judgement.reach[1 + position]), squared_norm),
                cosine=_cosine(
                    errors.inner_products[:, position],
                    errors.squared_norms[:, position],
                    errors.squared_exact[:, position],
                ),
                deterministic_error=wrong.get(name, 0.0),
                module=module,
                held_bytes=costs.figure("audited", module, "saved_bytes"),
                exact_held_bytes=costs.figure("exact", module, "saved_bytes"),
                backward_flops=costs.figure("audited", module, "backward_flops"),
                exact_backward_flops=costs.figure("exact", module, "backward_flops"),
            )
        )
    return tuple(layers)


def _added_variances(errors: DrawnErrors, processes: int, *, shared: bool) -> Tensor:
    """Return the variance that was added to each tensor of the gradient.

    Where a draw and its exact gradient share the model's random numbers it is that of the error. Where they do not, the
    error holds the model's own noise twice; it is then the variance of the draws without that of exact gradients, which
    chance may make negative.
    """
    if shared:
        return _variance(errors.squared_errors, errors.squared_mean_errors, processes).clamp_min(0)
    drawn = _variance(errors.squared_norms, errors.squared_means, processes)
    return drawn - _variance(errors.squared_exact, errors.squared_mean_exact, processes)


def _squared_biases(errors: DrawnErrors, processes: int) -> Tensor:
    """Return the squared norm of the mean error of each tensor, less what variance explains; it may be negative."""
    draws = errors.draws // processes
    variances = _variance(errors.squared_errors, errors.squared_mean_errors, processes)
    return errors.squared_mean_errors - variances / draws


def _variance(squares: Tensor, squared_mean: Tensor, processes: int) -> Tensor:
    """Return the unbiased variance of each tensor; means are those of one process's draws."""
    draws = len(squares) // processes
    return (squares.mean(0) - squared_mean) * draws / (draws - 1)


def _scale(along: Tensor, squared_norm: float) -> float:
    return 1 + float(along.mean()) / squared_norm if squared_norm > 0 else 1.0


def _cosine(inner_products: Tensor, squared_norms: Tensor, squared_exact: Tensor) -> float:
    lengths = (squared_norms * squared_exact).sqrt()
    both_zero = (squared_norms == 0) & (squared_exact == 0)
    cosines = torch.where(lengths > 0, inner_products / lengths, both_zero.to(lengths))
    return float(cosines.clamp(-1, 1).mean())


def _name_reference(findings: Findings) -> str:
    if findings.step.reference is not None:
        return "the one that was passed"
    if not findings.check.done:
        return f"the exact step; not checked against differences of the loss ({findings.check.remark})"
    if findings.check.wrong and not findings.step.accumulates:
        return "the exact step, which is not the derivative of the loss by central differences"
    return "the exact step, which is the derivative of the loss by central differences"


def _say_hidden(findings: Findings, added: Tensor) -> str:
    """Return a remark where parameters with most of the mini-batch's variance hide what is added to the others."""
    noise = findings.mini_batch.variances
    if noise is None or findings.preconditioned.fraction is not None:
        return ""
    known = noise > 0
    sizes = torch.tensor(findings.sizes, dtype=noise.dtype)[known]
    by_entry = relative(float((added[known] / noise[known] * sizes).sum()), float(sizes.sum()))
    fraction = relative(float(added.sum()), float(noise.sum()))
    if not max(_NOTICED, _HIDDEN * fraction) <= by_entry < math.inf:
        return ""
    largest = int(noise.argmax())
    return (
        f"the noise fraction of each parameter by itself is {by_entry:.2g} in the mean over all entries: "
        f"{100 * float(noise[largest] / noise.sum()):.0f} % of the mini-batch's variance is in "
        f"{findings.step.names[largest]}; it counts for an optimizer that scales parameters one by one, as Adam does"
        + "; pass optimizer= to cheapgrad.audit for its figure"
        * (not findings.preconditioned.is_asked)
    )


def _write_remarks(findings: Findings, added: Tensor) -> tuple[str, ...]:
    remarks = [
        *findings.mini_batch.remarks,
        findings.costs.remark,
        _say_hidden(findings, added),
        *findings.preconditioned.remarks,
    ]
    if findings.step.reference is None and not findings.step.is_converted and not findings.step.accumulates:
        remarks.append(
            "no layer of this model is cheapgrad's, so the exact step is the same code, run eagerly; pass reference= "
            "to compare with other code"
        )
    if findings.forward_noise == "not shared":
        remarks.append(
            "the step and its reference draw different random numbers in the forward pass: variance is the difference "
            "of two variances, and less bias can be seen"
        )
    if findings.confirmed:
        remarks.append("the first half of the draws gave an alarm; z-scores are what both it and all draws support")
    return tuple(remark for remark in remarks if remark)
