"""What the comparison says, in six plain sentences."""

from __future__ import annotations

from collections.abc import Callable

from cheapgrad.reporting.records import DemoRecord, MethodRecord, ModelRecord

# Accuracies closer than this are called the same: a percent of the test set is three or four pictures.
_SAME_ACCURACY = 0.01
# Step times closer than this are called the same: medians of interleaved steps differ by as much from run to run.
_SAME_TIME = 0.03


def write_verdict(record: DemoRecord) -> list[str]:
    """Return six sentences for somebody who has not read the table.

    Args:
        record: what the demo found.

    Returns:
        One line each on bias, prediction, time, bytes, the comparison with another batch size, and larger networks.
    """
    return [
        _on_bias(record),
        _on_prediction(record),
        "Time: " + _for_each_model(record, _on_time),
        "Memory: " + _for_each_model(record, _on_bytes),
        "Against a batch of equal step time: " + _for_each_model(record, _on_batches),
        _on_size(record),
    ]


def _strategies(model: ModelRecord) -> list[MethodRecord]:
    return [method for method in model.methods if method.kind == "strategy"]


def _for_each_model(record: DemoRecord, write: Callable[[ModelRecord], str]) -> str:
    return "; ".join(f"{model.name}: {write(model)}" for model in record.models) + "."


def _on_bias(record: DemoRecord) -> str:
    methods = [method for model in record.models for method in model.methods if not method.is_exact and method.draws]
    biased = [f"{method.label} (z = {method.max_abs_z:.1f})" for method in methods if not method.unbiased]
    if biased:
        return f"Bias: FOUND in {', '.join(biased)}; these gradients are wrong on average."
    audits = [(method.max_abs_z, method.band) for method in methods if method.max_abs_z is not None and method.band]
    if not audits:
        return "Bias: nothing but the exact method was run."
    z, band = max(audits, key=lambda audit: audit[0] / audit[1])
    blindest = max(method.detectable_relative_bias or 0.0 for method in methods)
    return (
        f"Bias: none found in {len(methods)} methods; the largest z is {z:.1f} where chance explains {band:.1f}, and a "
        f"gradient {100 * blindest:.0f} % too long or too short would have been seen in each."
    )


def _on_prediction(record: DemoRecord) -> str:
    strategies = [method for model in record.models for method in _strategies(model)]
    sentences = []
    for moment, methods in (
        ("what is stored", [method for method in strategies if method.cotangent is None]),
        ("the cotangent", [method for method in strategies if method.cotangent is not None]),
    ):
        ratios = [
            method.measured_relative_variance / method.predicted_relative_variance
            for method in methods
            if method.predicted_relative_variance and method.measured_relative_variance is not None
        ]
        if ratios:
            low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
            times = low if low == high else f"{low} to {high}"
            sentences.append(f"{times} times the predicted one for sketches of {moment}")
    if not sentences:
        return "Prediction: no strategy predicted a variance."
    explanation = ", whose noise also travels down to the layers below" if "cotangent" in sentences[-1] else ""
    return f"Prediction: measured variance is {', '.join(sentences)}{explanation}."


def _on_time(model: ModelRecord) -> str:
    equal = [method for method in _strategies(model) if _is_as_accurate(method, model)]
    faster = [method for method in equal if method.step_time_fraction < 1 - _SAME_TIME]
    if not faster:
        return "no strategy is faster than the exact step at the same accuracy"
    best = min(faster, key=lambda method: method.step_time_fraction)
    return f"{best.label} needs {best.step_time_fraction:.2f} of the exact step, {_accuracies(best, model)}"


def _on_bytes(model: ModelRecord) -> str:
    equal = [method for method in _strategies(model) if _is_as_accurate(method, model)]
    smaller = [method for method in equal if method.held_bytes_fraction < 1]
    if not smaller:
        return "no strategy holds fewer bytes than the exact step at the same accuracy"
    best = min(smaller, key=lambda method: method.held_bytes_fraction)
    return f"{best.label} holds {best.held_bytes_fraction:.2f} of the exact bytes, {_accuracies(best, model)}"


def _on_batches(model: ModelRecord) -> str:
    strategies = _strategies(model)
    if not strategies:
        return "nothing to compare"
    best = min(strategies, key=lambda method: method.cost_times_noise)
    if abs(best.cost_times_noise - 1) <= _SAME_TIME:
        outcome = "draws level"
    else:
        outcome = "wins" if best.cost_times_noise < 1 else "loses"
    return f"c(1+ω) is {best.cost_times_noise:.2f} at best ({best.label}), so where noise dominates it {outcome}"


def _on_size(record: DemoRecord) -> str:
    caution = "Size: these networks are tiny, and drawing costs a fixed time per layer"
    wide = [step for step in record.wide if step.kind == "strategy"]
    if not wide:
        return f"{caution}; measure your own."
    fastest = sorted(wide, key=lambda step: step.step_time_fraction)[:2]
    figures = " and ".join(f"{step.step_time_fraction:.2f} with {step.label}" for step in fastest)
    return f"{caution}: in a wider one ({fastest[0].description}) a step takes, of the exact time, {figures}."


def _is_as_accurate(method: MethodRecord, model: ModelRecord) -> bool:
    return method.accuracy_mean >= model.exact.accuracy_mean - _SAME_ACCURACY


def _accuracies(method: MethodRecord, model: ModelRecord) -> str:
    return f"{100 * method.accuracy_mean:.1f} % right (exact {100 * model.exact.accuracy_mean:.1f} %)"
