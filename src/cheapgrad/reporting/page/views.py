"""What the sections show, whatever kind of record it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cheapgrad.reporting.records import MethodRecord


@dataclass(frozen=True)
class HeldColumn:
    """What one way of running a step holds for backward, counted in a step.

    Attributes:
        label: name for people.
        modules: bytes by module.
        operations: bytes by operation, over all modules.
        total_bytes: of the whole step.
        style: number of its colour and shape.
    """

    label: str
    modules: Mapping[str, float]
    operations: Mapping[str, float]
    total_bytes: float
    style: int = 0


@dataclass(frozen=True)
class HeldGroup:
    """Ways of running the step of one model, the exact one first.

    Attributes:
        title: of the model or the files.
        columns: the ways.
        note: what the reader has to know.
    """

    title: str
    columns: tuple[HeldColumn, ...]
    note: str = ""


@dataclass(frozen=True)
class Noise:
    """Noise and bias of one parameter's gradient, or of a whole one; None is unknown.

    Attributes:
        relative_variance: ``E‖ĝ − g‖² / ‖g‖²``.
        noise_fraction: added variance divided by that of the mini-batch gradient.
        max_abs_z: largest z-score of the bias.
        detectable_relative_bias: error of scale that would have been found.
    """

    relative_variance: float | None = None
    noise_fraction: float | None = None
    max_abs_z: float | None = None
    detectable_relative_bias: float | None = None


@dataclass(frozen=True)
class NoiseColumn:
    """Noise and bias of one gradient.

    Attributes:
        label: name for people.
        layers: by parameter or layer.
        total: of the whole gradient.
        draws: gradients drawn; 0 where everything was modelled.
        band: largest z-score that chance explains.
        unbiased: whether no z-score lies beyond; None where nothing was tested.
        style: number of its colour and shape.
        modelled: whether a plan predicts the figures; else they were measured.
    """

    label: str
    layers: Mapping[str, Noise]
    total: Noise
    draws: int = 0
    band: float | None = None
    unbiased: bool | None = None
    style: int = 0
    modelled: bool = False

    def is_audited(self) -> bool:
        """Return whether anything was tested for bias."""
        return self.unbiased is not None


@dataclass(frozen=True)
class NoiseGroup:
    """Gradients of one model.

    Attributes:
        title: of the model or the files.
        columns: the gradients.
        note: what the reader has to know.
        row: what a row is of: a parameter's own noise, or what a layer adds to all parameters.
    """

    title: str
    columns: tuple[NoiseColumn, ...]
    note: str = ""
    row: str = "parameter"

    @property
    def names(self) -> list[str]:
        """Names of all layers, in the order in which they come."""
        return list(dict.fromkeys(name for column in self.columns for name in column.layers))


@dataclass(frozen=True)
class FrontierGroup:
    """Ways of training one model.

    Attributes:
        title: of the model.
        methods: the exact one first.
        note: what the reader has to know.
    """

    title: str
    methods: tuple[MethodRecord, ...]
    note: str = ""


@dataclass(frozen=True)
class Views:
    """Everything that the page shows, apart from where it comes from.

    Attributes:
        held: bytes held by layer and operation.
        noise: variance and bias by layer.
        frontiers: time, bytes and accuracy.
        sentences: what the records say in words.
    """

    held: tuple[HeldGroup, ...] = ()
    noise: tuple[NoiseGroup, ...] = ()
    frontiers: tuple[FrontierGroup, ...] = ()
    sentences: tuple[str, ...] = field(default=())
