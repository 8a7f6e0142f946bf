"""What a run is, said before it is made; its identity is the hash of what is said."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class CostRun:
    """Time and bytes of a step of every method on one network, measured in turn in one process.

    Attributes:
        task: name of the task.
        network: the network in words.
        data: name and fingerprint of the data.
        batch_size: examples in a step.
        methods: what each method does, in words that tell any two apart.
        rounds: timed steps of every method.
        threads: of torch.
        seed: of the weights, and number of the measurement: the next one measures anew, on a quieter machine say.
    """

    kind: ClassVar[str] = "costs"
    task: str
    network: str
    data: str
    batch_size: int
    methods: tuple[str, ...]
    rounds: int
    threads: int
    seed: int = 0


@dataclass(frozen=True)
class TrainingRun:
    """One network, trained once.

    Attributes:
        task: name of the task.
        network: the network in words.
        data: name and fingerprint of the data.
        method: what the method does, in words that tell any two apart.
        batch_size: examples in a step.
        parts: into how many micro-batches a batch is cut, whose gradients are added up.
        steps: of the optimizer.
        learning_rate: peak of the schedule.
        seed: of weights, order of the examples and draws.
        evaluations: points of the curve.
        noise_points: points at which added variance is measured.
    """

    kind: ClassVar[str] = "training"
    task: str
    network: str
    data: str
    method: str
    batch_size: int
    parts: int
    steps: int
    learning_rate: float
    seed: int
    evaluations: int
    noise_points: int


@dataclass(frozen=True)
class NoiseRun:
    """One exact training, at points of which the noise of several methods is measured.

    Attributes:
        task: name of the task.
        network: the network in words.
        data: name and fingerprint of the data.
        batch_size: examples in a step.
        methods: what each method does, in words that tell any two apart.
        steps: of the optimizer, in the whole training.
        learning_rate: peak of the schedule.
        seed: of weights and order of the examples.
        points: shares of the steps.
        batches: that noise is measured on.
        draws: of the gradient, for each batch.
    """

    kind: ClassVar[str] = "noise"
    task: str
    network: str
    data: str
    batch_size: int
    methods: tuple[str, ...]
    steps: int
    learning_rate: float
    seed: int
    points: tuple[float, ...]
    batches: int
    draws: int


Declaration = CostRun | TrainingRun | NoiseRun


def describe(declaration: Declaration) -> dict[str, Any]:
    """Return the declaration as data for JSON."""
    return {"kind": declaration.kind, **json.loads(json.dumps(asdict(declaration)))}


def identify(declaration: Declaration | Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that differ for different declarations.

    >>> run = CostRun("task", "network", "data", 8, ("exact",), 3, 1)
    >>> identify(run) == identify(describe(run))
    True
    """
    data = declaration if isinstance(declaration, Mapping) else describe(declaration)
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
