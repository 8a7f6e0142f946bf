"""The cheap-gradient principle, held against the ledger of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from cheapgrad.cost.report import CostReport
from cheapgrad.cost.units import format_flops
from cheapgrad.errors import BudgetError, UnknownNameError, check_instance, nearest_match
from cheapgrad.plain_data import read_record


class Factors(NamedTuple):
    """What the derivatives of an operation cost at most, in units of the operation itself.

    Attributes:
        reverse: operation and reverse mode together.
        tangent: what each direction of forward mode adds.
    """

    reverse: float
    tangent: float


# A product of two operands: each of its two derivatives, and each of its two tangents, is a product of the same size.
_BILINEAR = Factors(3.0, 2.0)
_TRILINEAR = Factors(4.0, 3.0)
# Two products forward; backward the scores once more and four products. Tangents: both products, by both operands.
_FUSED_ATTENTION = Factors(3.5, 2.0)
# The same where values may be narrower than queries and keys: backward (3 E + 2 V) / (E + V) is below 3 for all widths.
_FUSED_ATTENTION_ANY_WIDTH = Factors(4.0, 2.0)

_FACTORS: dict[str, Factors] = {
    **dict.fromkeys(
        (
            "aten::mm",
            "aten::addmm",
            "aten::bmm",
            "aten::baddbmm",
            "aten::addbmm",
            "aten::mv",
            "aten::addmv",
            "aten::dot",
            "aten::vdot",
            "aten::linear",
            "aten::mkldnn_linear",
            "aten::convolution",
            "aten::_convolution",
            "aten::convolution_overrideable",
            "aten::cudnn_convolution",
            "aten::_slow_conv2d_forward",
            "aten::mkldnn_rnn_layer",
            "aten::_cudnn_rnn",
            "aten::miopen_rnn",
            "aten::embedding",
            "aten::_embedding_bag",
        ),
        _BILINEAR,
    ),
    "aten::_trilinear": _TRILINEAR,
    **dict.fromkeys(
        (
            "aten::_scaled_dot_product_flash_attention",
            "aten::_scaled_dot_product_flash_attention_for_cpu",
            "aten::_flash_attention_forward",
        ),
        _FUSED_ATTENTION,
    ),
    **dict.fromkeys(
        (
            "aten::_scaled_dot_product_efficient_attention",
            "aten::_scaled_dot_product_cudnn_attention",
            "aten::_scaled_dot_product_fused_attention_overrideable",
            "aten::_efficient_attention_forward",
            "higher_order::flex_attention",
        ),
        _FUSED_ATTENTION_ANY_WIDTH,
    ),
}


@dataclass(frozen=True)
class OperationFactor:
    """The principle on one operation of a model.

    Attributes:
        operation: such as ``"aten::addmm"``.
        forward_flops: of all its calls.
        backward_flops: of what differentiates them.
        stated: the factor that (forward + backward) / forward cannot exceed; None if none is known.
        tangent: what each direction of forward mode adds at most, in units of the operation; None if unknown.
    """

    operation: str
    forward_flops: int
    backward_flops: int
    stated: float | None
    tangent: float | None

    @property
    def measured(self) -> float:
        """(forward + backward) / forward, from what ran; infinite where nothing was counted forward."""
        if not self.forward_flops:
            return float("inf")
        return (self.forward_flops + self.backward_flops) / self.forward_flops


@dataclass(frozen=True)
class CheapGradient:
    """The principle on a model; see `cheap_gradient`.

    Attributes:
        rows: one for each operation with FLOPs, the largest first.
        bound: ``Σ ωᵢ Fᵢ / Σ Fᵢ``: what the stated factors allow this model; None if a factor is unknown, or nothing
            was counted.
        worst_factor: the largest stated factor among its operations: a bound for every model made of them.
        measured: (forward + backward) / forward of the whole step.
        measured_with_recomputation: the same with what checkpoints ran again.
        unstated: operations without a stated factor.
        uncounted: operations that ran without a FLOP formula: neither the bound nor what was measured has them.
    """

    rows: tuple[OperationFactor, ...]
    bound: float | None
    worst_factor: float | None
    measured: float | None
    measured_with_recomputation: float | None
    unstated: tuple[str, ...]
    uncounted: tuple[str, ...]

    @property
    def holds(self) -> bool | None:
        """Whether what was measured keeps the bound; None if there is none."""
        if self.bound is None or self.measured is None:
            return None
        # Factors are sums of a few binary fractions, weighted by whole numbers.
        return self.measured <= self.bound * (1 + 1e-12)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain lists and numbers, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CheapGradient:
        """Return the record that `to_dict` wrote; `RecordError` if it is none."""
        return read_record(cls, data)

    def __str__(self) -> str:
        lines = [f"{'operation':<48}{'forward':>14}{'backward':>14}{'measured':>10}{'at most':>9}"]
        for row in self.rows:
            at_most = "unknown" if row.stated is None else f"{row.stated:g}"
            lines.append(
                f"{row.operation:<48}{format_flops(row.forward_flops):>14}{format_flops(row.backward_flops):>14}"
                f"{row.measured:>10.3f}{at_most:>9}"
            )
        measured = "nothing" if self.measured is None else f"{self.measured:.3f}"
        bound = "unknown" if self.bound is None else f"{self.bound:.3f}"
        lines.append(f"forward and backward in units of forward: measured {measured}, at most {bound}")
        exceeded = [row for row in self.rows if row.stated is not None and row.measured > row.stated * (1 + 1e-12)]
        if exceeded:
            lines.append(
                f"EXCEEDED by {', '.join(row.operation for row in exceeded)}, so that this is no bound: a factor that "
                "was given is too small"
            )
        if self.uncounted:
            lines.append(f"without a formula, and in no figure: {', '.join(self.uncounted)}")
        return "\n".join(lines)


def cheap_gradient(report: CostReport, *, factors: Mapping[str, float] | None = None) -> CheapGradient:
    """Hold the cheap-gradient principle against what a model's step really computed.

    Reverse mode visits every operation of a program once and multiplies by its derivative, so that
    ``cost(f, ∇f) ≤ ω cost(f)`` with ω the largest ``(forward + backward) / forward`` of a single operation: however
    many parameters there are, and whether or not the operations are smooth. For products of matrices, convolutions and
    recurrent layers ω is 3, for fused attention 3.5, for `nn.Bilinear` 4.

    Args:
        report: what `cheapgrad.scan` returned.
        factors: ω of operations that have none here, such as custom ones; by name as in the report, each at least 1.
            One that is exceeded by what ran is said to be, when the result is printed.

    Returns:
        Factor by operation, stated and measured; the bound that follows for this model, and what was measured.

    Law:
        The bound is exact arithmetic on FLOPs of dense operations; the measured value keeps it for every model whose
        operations all have a stated factor, and lies below it where a gradient is not needed (that of the batch, of
        frozen weights). Checkpoints add up to one forward pass on top. Not bounded: the gradient of a sparse matrix,
        which autograd computes as if it were dense. Nothing is said of time: bytes moved have their own factor.

    Raises:
        ArgumentError: `report` is no report, or `factors` no dictionary.
        BudgetError: a factor given is not a number of at least 1.
        UnknownNameError: a factor is given for an operation that has no FLOPs in the report.

    Example:
        >>> import torch
        >>> from cheapgrad.cost import scan
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> principle = cheap_gradient(scan(model, torch.ones(32, 8)))
        >>> principle.bound, round(principle.measured, 3), principle.holds
        (3.0, 2.333, True)

    References:
        Baur and Strassen, "The complexity of partial derivatives", Theoretical Computer Science 22 (1983); Bolte,
        Boustany, Pauwels, Pesquet-Popescu, "On the complexity of nonsmooth automatic differentiation", ICLR 2023, for
        programs with kinks. Their unit is the scalar operation, ours the tensor operation, and the factors are ours.
    """
    check_instance("report", report, CostReport, "give what cheapgrad.scan(model, batch) returned")
    if factors is not None:
        check_instance("factors", factors, Mapping, "write e.g. {'mylib::fused': 3.0}")
    given = {name: _check_factor(name, factor) for name, factor in (factors or {}).items()}
    counted = {cost.operation for cost in report.operations if cost.forward_flops or cost.backward_flops}
    for name in given:
        if name not in counted:
            reason = "it ran without a formula, see register_formula" if name in report.uncounted else "it has not run"
            raise UnknownNameError(
                f"a factor was given for {name!r}, of which the report has no FLOPs: {reason}"
                f"{nearest_match(str(name), counted)}"
            )
    rows = _add_up_operations(report, given)
    forward = sum(row.forward_flops for row in rows)
    unstated = tuple(row.operation for row in rows if row.stated is None)
    stated = [(row.stated, row.forward_flops) for row in rows if row.stated is not None]
    total = report.total
    return CheapGradient(
        rows=rows,
        bound=None if unstated or not forward else sum(factor * flops for factor, flops in stated) / forward,
        worst_factor=None if unstated or not stated else max(factor for factor, _ in stated),
        measured=1 + total.backward_flops / forward if forward else None,
        measured_with_recomputation=total.flops / forward if forward else None,
        unstated=unstated,
        uncounted=report.uncounted,
    )


def _add_up_operations(report: CostReport, given: Mapping[str, float]) -> tuple[OperationFactor, ...]:
    """Return the FLOPs of each operation over all modules."""
    sums: dict[str, list[int]] = {}
    for cost in report.operations:
        if cost.forward_flops or cost.backward_flops:
            sum_of = sums.setdefault(cost.operation, [0, 0])
            sum_of[0] += cost.forward_flops
            sum_of[1] += cost.backward_flops
    rows = []
    for name, (forward, backward) in sums.items():
        known = _FACTORS.get(name)
        rows.append(
            OperationFactor(
                operation=name,
                forward_flops=forward,
                backward_flops=backward,
                stated=given.get(name, known.reverse if known else None),
                tangent=known.tangent if known else None,
            )
        )
    return tuple(sorted(rows, key=lambda row: (-row.forward_flops - row.backward_flops, row.operation)))


def _check_factor(name: str, factor: object) -> float:
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 1 <= factor < float("inf"):
        raise BudgetError(
            f"the factor of {name} must be a finite number of at least 1, but got {factor!r}; it is (forward + "
            "backward) / forward, 3 for a product whose two gradients take as much as itself"
        )
    return float(factor)
