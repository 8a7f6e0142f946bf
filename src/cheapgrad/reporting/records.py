"""What a comparison of training methods found: plain data that goes to JSON and back."""

from __future__ import annotations

import math
import statistics
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from cheapgrad.plain_data import plain

# Where every number of a record comes from; written beside them.
PROVENANCE = {
    "accuracies": "measured: test accuracy after training, one for each seed",
    "step_seconds": "measured: median time of a whole training step, all methods interleaved",
    "step_time_fraction": "measured: step_seconds divided by that of the exact method",
    "held_bytes": "measured: distinct storages held for backward by one training step, parameters left out",
    "predicted_relative_variance": "modelled: sum over the layers of each layer's own law; noise that reaches a weight "
    "through a sketched dX of a layer above is not in it; for a smaller batch, the law of sampling without replacement",
    "measured_relative_variance": "measured: mean of ||drawn - exact||^2 / ||exact||^2 over the draws",
    "noise_fraction": "measured: added variance divided by that of the mini-batch gradient, itself measured from the "
    "gradients of single examples; for another batch size computed: usual size / size - 1",
    "max_abs_z": "measured: largest z-score of the bias over entries and projections, at fixed weights and batch",
    "band": "computed: what chance explains, family-wise false alarm probability 1e-6",
    "detectable_relative_bias": "computed: error of scale that would have been found with probability 0.99",
    "tensors": "measured: the same figures for each parameter of the model",
    "held": "measured: bytes held for backward by module and operation; the batch itself counts, as it does not in "
    "`held_bytes`",
}


@dataclass(frozen=True)
class TensorRecord:
    """Noise and bias of one parameter's gradient.

    Attributes:
        name: of the parameter.
        relative_variance: ``E‖ĝ − g‖² / ‖g‖²``.
        noise_fraction: added variance divided by that of the mini-batch gradient; None where that is zero.
        max_abs_z: largest z-score of the bias.
        detectable_relative_bias: error of scale that would have been found.
    """

    name: str
    relative_variance: float
    noise_fraction: float | None
    max_abs_z: float
    detectable_relative_bias: float


@dataclass(frozen=True)
class HeldRecord:
    """What one operation of one module holds for backward.

    Attributes:
        module: qualified name.
        operation: such as ``"aten::addmm"``.
        held_bytes: bytes, every storage counted once.
    """

    module: str
    operation: str
    held_bytes: int


@dataclass(frozen=True)
class MethodRecord:
    """One way of training one model.

    Attributes:
        label: name for people.
        kind: ``"exact"``, ``"checkpoint"`` (recomputed instead of held), ``"batch"`` (another batch size) or
            ``"strategy"``.
        family: methods that differ by their budget only share it.
        stored: the strategy for what is stored, as text, or None.
        cotangent: the strategy for the cotangent, as text, or None.
        batch_size: examples in a training step.
        accuracies: share of test examples classified rightly, one for each seed.
        step_seconds: median time of a training step.
        step_time_fraction: the same, divided by that of the exact method.
        held_bytes: bytes held for backward by a training step.
        held_bytes_fraction: the same, divided by that of the exact method.
        predicted_relative_variance: ``E‖ĝ − g‖² / ‖g‖²`` by the laws, or None if they do not say.
        measured_relative_variance: the same, measured; None, as all that follows from draws, for a batch as large
            as the exact method's or larger, which adds no variance.
        measured_relative_variance_standard_error: of the measured one.
        noise_fraction: added variance divided by that of the mini-batch gradient; negative for a larger batch.
        draws: gradients drawn for the variance and the bias, 0 for a larger batch.
        max_abs_z: largest z-score of the bias.
        band: largest z-score that chance explains.
        detectable_relative_bias: error of scale that would have been found.
        unbiased: whether no z-score lies beyond the band.
        remark: what else the reader has to know.
        tensors: noise and bias of every parameter; empty where nothing was drawn.
        held: bytes held by module and operation.
    """

    label: str
    kind: str
    family: str
    stored: str | None
    cotangent: str | None
    batch_size: int
    accuracies: tuple[float, ...]
    step_seconds: float
    step_time_fraction: float
    held_bytes: int
    held_bytes_fraction: float
    predicted_relative_variance: float | None
    measured_relative_variance: float | None
    measured_relative_variance_standard_error: float | None
    noise_fraction: float
    draws: int
    max_abs_z: float | None
    band: float | None
    detectable_relative_bias: float | None
    unbiased: bool
    remark: str = ""
    tensors: tuple[TensorRecord, ...] = ()
    held: tuple[HeldRecord, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether its gradient is the exact one of the usual batch, so that there is nothing to audit."""
        return self.kind in {"exact", "checkpoint"}

    @property
    def accuracy_mean(self) -> float:
        """Mean test accuracy over the seeds; nan where there is none or one is no number."""
        return statistics.fmean(self.accuracies) if self._has_accuracies else math.nan

    @property
    def accuracy_deviation(self) -> float:
        """Standard deviation of the test accuracy over the seeds; nan for a single seed and where the mean is."""
        return statistics.stdev(self.accuracies) if self._has_accuracies and len(self.accuracies) > 1 else math.nan

    @property
    def _has_accuracies(self) -> bool:
        return bool(self.accuracies) and all(map(math.isfinite, self.accuracies))

    @property
    def cost_times_noise(self) -> float:
        """``c(1 + ω)``: below 1, the method needs less time than a smaller batch where noise dominates."""
        return self.step_time_fraction * (1 + self.noise_fraction)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, the derived figures included."""
        return {
            **asdict(self),
            "accuracy_mean": self.accuracy_mean,
            "accuracy_deviation": self.accuracy_deviation,
            "cost_times_noise": self.cost_times_noise,
        }


@dataclass(frozen=True)
class ModelRecord:
    """Every method, on one model.

    Attributes:
        name: of the model.
        description: its architecture in words.
        parameters: how many it has.
        training_steps: optimizer steps of every method.
        batch_size: of the exact method.
        audit_batch_size: of the fixed batch on which variance and bias are measured.
        methods: the exact method first.
    """

    name: str
    description: str
    parameters: int
    training_steps: int
    batch_size: int
    audit_batch_size: int
    methods: tuple[MethodRecord, ...]

    @property
    def exact(self) -> MethodRecord:
        """The exact method."""
        return self.methods[0]


@dataclass(frozen=True)
class StepRecord:
    """Time of a training step of a network that is not trained.

    Attributes:
        description: the network in words.
        label: of the method.
        kind: of the method.
        step_seconds: median time of a training step.
        step_time_fraction: the same, divided by that of the exact method.
    """

    description: str
    label: str
    kind: str
    step_seconds: float
    step_time_fraction: float


@dataclass(frozen=True)
class DemoRecord:
    """Everything that `cheapgrad demo` found.

    Attributes:
        data: the data set in words.
        seeds: of the initialisations and the order of the examples.
        seconds: time the whole demo took.
        environment: versions and hardware.
        models: one record for each model.
        wide: step times in a wider network, the exact method's first.
        command: that made it, or None if it was made by a program.
    """

    data: str
    seeds: tuple[int, ...]
    seconds: float
    environment: dict[str, Any]
    models: tuple[ModelRecord, ...]
    wide: tuple[StepRecord, ...]
    command: str | None = None

    @property
    def unbiased(self) -> bool:
        """Whether no method shows a bias."""
        return all(method.unbiased for model in self.models for method in model.methods)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for strict JSON: infinities become ``"inf"``, what is undefined becomes ``"nan"``."""
        models = [{**asdict(model), "methods": [method.to_dict() for method in model.methods]} for model in self.models]
        return plain(
            {
                "kind": "cheapgrad.demo",
                "version": 1,
                **asdict(self),
                "unbiased": self.unbiased,
                "models": models,
                "provenance": PROVENANCE,
            }
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DemoRecord:
        """Return the record that `to_dict` was called on."""
        models = tuple(
            _build(ModelRecord, {**model, "methods": tuple(map(_build_method, model["methods"]))})
            for model in data["models"]
        )
        wide = tuple(_build(StepRecord, step) for step in data["wide"])
        return _build(cls, {**data, "models": models, "wide": wide})


def _build_method(data: dict[str, Any]) -> MethodRecord:
    tensors = tuple(_build(TensorRecord, tensor) for tensor in data.get("tensors", ()))
    held = tuple(_build(HeldRecord, entry) for entry in data.get("held", ()))
    return _build(MethodRecord, {**data, "tensors": tensors, "held": held})


def _build(record_type: Any, data: dict[str, Any]) -> Any:
    """Build a record from the fields that it has, derived figures being left out.

    Fields that came later have defaults, so that older records can be read.
    """
    known = [field for field in fields(record_type) if field.name in data or field.default is MISSING]
    return record_type(**{field.name: _restore(data[field.name]) for field in known})


def _restore(value: Any) -> Any:
    if isinstance(value, str) and value in {"inf", "-inf", "nan"}:
        return float(value)
    return tuple(value) if isinstance(value, list) else value
