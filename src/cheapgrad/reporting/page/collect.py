"""From records to what the page shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from cheapgrad.auditing.report import AuditReport, LayerAudit
from cheapgrad.cost.comparison import CostComparison
from cheapgrad.cost.report import CostReport, Figures
from cheapgrad.planning.record import Plan
from cheapgrad.reporting.page.plan_section import describe_plan
from cheapgrad.reporting.page.views import (
    FrontierGroup,
    HeldColumn,
    HeldGroup,
    Noise,
    NoiseColumn,
    NoiseGroup,
    Views,
)
from cheapgrad.reporting.record_files import RecordFile
from cheapgrad.reporting.records import DemoRecord, ModelRecord
from cheapgrad.reporting.verdict import write_verdict

_BATCH_COUNTS = "The batch itself counts here."
_WITHOUT_DATA = "counted without data"


def collect_views(files: Sequence[RecordFile]) -> Views:
    """Return what the sections show.

    Args:
        files: the records.
    """
    demos = [file for file in files if isinstance(file.record, DemoRecord)]
    held, noise, frontiers, sentences = [], [], [], []
    for file in demos:
        for model in file.record.models:
            if model.methods:
                title = model.name if len(demos) == 1 else f"{model.name} ({file.label})"
                held += _held_by_methods(model, title)
                noise += _noise_of_methods(model, title)
                frontiers.append(_frontier(file.record, model, title))
        methods = [method for model in file.record.models for method in model.methods]
        if all(model.methods for model in file.record.models) and all(method.accuracies for method in methods):
            sentences += write_verdict(file.record)
    held += _held_in_scans([file for file in files if isinstance(file.record, CostReport)])
    for file in files:
        if isinstance(file.record, CostComparison):
            held.append(_held_in_comparison(file.record, file.label))
    audits = [file for file in files if isinstance(file.record, AuditReport)]
    noise += _noise_in_audits(audits)
    for file in audits:
        held += _held_in_audit(file.record, file.label)
        sentences.append(f"{file.label}: {file.record.verdict()}")
    for file in files:
        if isinstance(file.record, Plan):
            held += _held_in_plan(file.record, file.label)
            noise += _noise_in_plan(file.record, file.label)
            sentences.append(describe_plan(file.record, file.label))
    return Views(tuple(held), tuple(noise), tuple(frontiers), tuple(sentences))


def _held_by_methods(model: ModelRecord, title: str) -> list[HeldGroup]:
    columns = []
    for style, method in enumerate(model.methods):
        if method.held:
            modules = _add_up((entry.module, entry.held_bytes) for entry in method.held)
            operations = _add_up((entry.operation, entry.held_bytes) for entry in method.held)
            columns.append(HeldColumn(method.label, modules, operations, sum(modules.values()), style))
    return [HeldGroup(title, tuple(columns), _BATCH_COUNTS)] if columns else []


def _noise_of_methods(model: ModelRecord, title: str) -> list[NoiseGroup]:
    columns = tuple(
        NoiseColumn(
            label=method.label,
            layers={
                tensor.name: Noise(
                    tensor.relative_variance, tensor.noise_fraction, tensor.max_abs_z, tensor.detectable_relative_bias
                )
                for tensor in method.tensors
            },
            total=Noise(
                method.measured_relative_variance,
                method.noise_fraction,
                method.max_abs_z,
                method.detectable_relative_bias,
            ),
            draws=method.draws,
            band=method.band,
            unbiased=method.unbiased,
            style=style,
        )
        for style, method in enumerate(model.methods)
        if not method.is_exact and method.draws
    )
    note = f"Drawn on a fixed batch of {model.audit_batch_size} examples, with the weights of half the exact training."
    return [NoiseGroup(title, columns, note)] if columns else []


def _frontier(record: DemoRecord, model: ModelRecord, title: str) -> FrontierGroup:
    seeds = len(record.seeds)
    note = (
        f"{model.description}; {model.parameters:,} parameters, {model.training_steps} optimizer steps. {record.data}. "
        f"Mean and standard deviation over {seeds} seed{'s' * (seeds != 1)}."
    )
    return FrontierGroup(title, model.methods, note)


def _held_in_scans(files: Sequence[RecordFile]) -> list[HeldGroup]:
    """Put scans of models with the same modules side by side, one labelled "exact" first, else the first by name."""
    groups: dict[tuple[str, ...], list[RecordFile]] = defaultdict(list)
    for file in files:
        groups[tuple(row.name for row in file.record.rows if row.name != "(outside)")].append(file)
    return [_held_in_group(group) for group in groups.values()]


def _held_in_group(files: Iterable[RecordFile]) -> HeldGroup:
    ordered = sorted(files, key=lambda file: "exact" not in file.label.lower())
    columns = tuple(
        HeldColumn(
            label=f"{file.label} ({_WITHOUT_DATA})" if file.record.fake else file.label,
            modules={row.name or "(model)": row.saved_bytes for row in file.record.rows},
            operations=_add_up((cost.operation, cost.saved_bytes) for cost in file.record.operations),
            total_bytes=file.record.total.saved_bytes,
            style=style,
        )
        for style, file in enumerate(ordered)
    )
    remarks = [f"{file.label}: {remark}" for file in ordered for remark in file.record.remarks]
    return HeldGroup(" and ".join(file.name for file in ordered), columns, " ".join([_BATCH_COUNTS, *remarks]))


def _held_in_comparison(comparison: CostComparison, label: str) -> HeldGroup:
    def column(name: str, figures: dict[str, Figures | None], total: Figures, style: int) -> HeldColumn:
        modules = {module or "(model)": one.saved_bytes for module, one in figures.items() if one is not None}
        return HeldColumn(name, modules, {}, total.saved_bytes, style)

    before = column("before", {row.name: row.before for row in comparison.rows}, comparison.before, 0)
    after = column("after", {row.name: row.after for row in comparison.rows}, comparison.after, 1)
    return HeldGroup(label, (before, after), " ".join([_BATCH_COUNTS, *comparison.remarks]))


def _noise_in_audits(files: Sequence[RecordFile]) -> list[NoiseGroup]:
    """Put audits of the same parameters side by side."""
    groups: dict[tuple[str, ...], list[RecordFile]] = defaultdict(list)
    for file in files:
        groups[tuple(layer.name for layer in file.record.layers)].append(file)
    return [
        NoiseGroup(
            title=" and ".join(file.label for file in group),
            columns=tuple(_noise_in_audit(file.record, file.label, 1 + style) for style, file in enumerate(group)),
            note=" ".join(f"{file.label}: {remark}" for file in group for remark in _remarks(file.record)),
        )
        for group in groups.values()
    ]


def _remarks(audit: AuditReport) -> list[str]:
    return [f"compared with {audit.reference}.", *audit.remarks]


def _noise_in_audit(audit: AuditReport, label: str, style: int) -> NoiseColumn:
    def read(one: AuditReport | LayerAudit) -> Noise:
        return Noise(one.relative_variance, one.noise_fraction, one.max_abs_z, one.detectable_relative_bias)

    return NoiseColumn(
        label=label,
        layers={layer.name: read(layer) for layer in audit.layers},
        total=read(audit),
        draws=audit.draws,
        band=audit.band,
        unbiased=audit.unbiased,
        style=style,
    )


def _held_in_audit(audit: AuditReport, label: str) -> list[HeldGroup]:
    if audit.held_bytes is None or audit.exact_held_bytes is None:
        return []

    def column(name: str, entries: Iterable[tuple[str, int | None]], total: int, style: int) -> HeldColumn:
        return HeldColumn(name, _add_up((module, held or 0) for module, held in entries), {}, total, style)

    exact = column(
        "exact", ((layer.module, layer.exact_held_bytes) for layer in audit.layers), audit.exact_held_bytes, 0
    )
    audited = column(label, ((layer.module, layer.held_bytes) for layer in audit.layers), audit.held_bytes, 1)
    note = "Of modules with parameters; what the others and the loss hold is in the sum only."
    return [HeldGroup(label, (exact, audited), note)]


def _held_in_plan(plan: Plan, label: str) -> list[HeldGroup]:
    """Put the planned step beside the exact one; both were counted while planning."""
    if not plan.held:
        return []

    def column(name: str, held: Sequence[int], style: int) -> HeldColumn:
        modules = _add_up((part.module, amount) for part, amount in zip(plan.held, held, strict=True))
        operations = _add_up((part.operation, amount) for part, amount in zip(plan.held, held, strict=True))
        return HeldColumn(name, modules, operations, sum(held), style)

    exact = column("exact", [part.exact_bytes for part in plan.held], 0)
    planned = column("planned", [part.planned_bytes for part in plan.held], 1)
    return [HeldGroup(label, (exact, planned), f"Counted in one step of each kind while planning. {_BATCH_COUNTS}")]


def _noise_in_plan(plan: Plan, label: str) -> list[NoiseGroup]:
    if not plan.layers:
        return []
    layers = {layer.name or "(model)": Noise(noise_fraction=layer.noise_fraction) for layer in plan.layers}
    total = Noise(noise_fraction=plan.predicted.noise_fraction)
    column = NoiseColumn("planned", layers, total, style=1, modelled=True)
    note = (
        "What the sketches of each layer add to the gradient of all parameters, with all other layers exact; "
        "layers whose codes are chosen together have equal shares of what these add. Together they meet each other's "
        "noise, so that the whole is not their sum."
    )
    if plan.in_optimizer_units:
        note += " Both variances are in units of the optimizer's steps, parameter by parameter."
    return [NoiseGroup(label, (column,), note, row="layer")]


def _add_up(entries: Iterable[tuple[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, amount in entries:
        sums[name or "(model)"] = sums.get(name or "(model)", 0) + amount
    return sums
