"""Which networks are trained on which data, and how: the same for every method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.experiments.datasets import Dataset, Split
from benchmarks.experiments.networks import Perceptron
from benchmarks.networks import BagNet, LanguageModel, loss_of
from benchmarks.vision_transformer import VisionTransformer


@dataclass(frozen=True)
class Task:
    """A network on data.

    Attributes:
        name: of the task.
        network: the network in words.
        build: makes it, from torch's random state.
        arrange: brings examples ``[B, ...]`` into the form that the network takes.
        dataset: the data.
        batch_size: examples in a step.
        steps: of the optimizer; 0 where only a step is timed.
        learning_rates: to choose from, ascending.
        skip_small: whether small layers are left alone, as `cheapgrad.approximate` does by default.
        evaluations: points of the curve.
        noise_points: points at which added variance is measured.
        curve_examples: validation examples that a point of the curve is measured on, at most.
        sweeps: whether all budgets of published and biased methods are trained, also those that are not asked for.
    """

    name: str
    network: str
    build: Callable[[], nn.Module]
    arrange: Callable[[Tensor], Tensor]
    dataset: Dataset
    batch_size: int
    steps: int
    learning_rates: tuple[float, ...]
    skip_small: bool = True
    evaluations: int = 10
    noise_points: int = 3
    # A point is for the shape of the curve; the last figures are on everything.
    curve_examples: int = 1000
    sweeps: bool = False
    data: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", self.dataset.fingerprint)

    def build_seeded(self, seed: int) -> nn.Module:
        """Return the network that belongs to a seed, in training mode."""
        torch.manual_seed(seed)
        return self.build().train()

    def take(self, split: Split, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and labels of these examples, as the network takes them."""
        part = split.choose(index)
        return self.arrange(part.inputs), part.labels

    def compute_loss(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy over all that is classified."""
        return loss_of(model, inputs, labels)


@dataclass(frozen=True)
class _Standard:
    """Pictures to numbers of mean 0 and deviation 1, then into a shape."""

    mean: Tensor
    deviation: Tensor
    shape: Callable[[Tensor], Tensor]

    def __call__(self, pictures: Tensor) -> Tensor:
        return self.shape((pictures.float() - self.mean) / self.deviation)


def _standardise(dataset: Dataset, shape: Callable[[Tensor], Tensor]) -> _Standard:
    pictures = dataset.train.inputs[:5000].float()
    mean, deviation = pictures.mean((0, 2, 3), keepdim=True), pictures.std((0, 2, 3), keepdim=True)
    return _Standard(mean, deviation, shape)


def _cut(side: int) -> Callable[[Tensor], Tensor]:
    """Return what cuts pictures into patches of `side` x `side` pixels, ``[B, T, channels side side]``."""
    return lambda pictures: functional.unfold(pictures, side, stride=side).transpose(1, 2)


def _three_channels(pictures: Tensor) -> Tensor:
    return pictures.expand(-1, 3, -1, -1)


def make_perceptron_task(dataset: Dataset, *, hidden: int, epochs: float, batch_size: int, name: str = "MLP") -> Task:
    """Return a perceptron on flattened pictures."""
    inputs = dataset.train.inputs[0].numel()
    return Task(
        name=f"{name} on {dataset.name}",
        network=f"perceptron {inputs} - {hidden} - {hidden} - {dataset.classes}, ReLU",
        build=lambda: Perceptron(inputs, hidden, dataset.classes),
        arrange=_standardise(dataset, lambda pictures: pictures.flatten(1)),
        dataset=dataset,
        batch_size=batch_size,
        steps=round(epochs * len(dataset.train) / batch_size),
        learning_rates=(1e-3, 3e-3, 1e-2),
    )


def make_transformer_task(
    dataset: Dataset, *, width: int, depth: int, side: int, heads: int, epochs: float, batch_size: int
) -> Task:
    """Return a vision transformer on patches."""
    channels, height, across = dataset.train.inputs.shape[1:]
    tokens, patch = (height // side) * (across // side), channels * side * side
    return Task(
        name=f"ViT on {dataset.name}",
        network=f"vision transformer, width {width}, depth {depth}, {tokens} tokens of {patch} numbers, {heads} heads",
        build=lambda: VisionTransformer(width, depth, tokens, patch, dataset.classes, width // heads),
        arrange=_standardise(dataset, _cut(side)),
        dataset=dataset,
        batch_size=batch_size,
        steps=round(epochs * len(dataset.train) / batch_size),
        learning_rates=(3e-4, 1e-3, 3e-3),
        curve_examples=500,
    )


def make_bagnet_task(dataset: Dataset, *, width: int, epochs: float, batch_size: int) -> Task:
    """Return a ConvNet of small patches in the manner of BagNet."""
    return Task(
        name=f"BagNet on {dataset.name}",
        network=f"BagNet, width {width}, {'x'.join(map(str, dataset.train.inputs.shape[2:]))} pixels",
        build=lambda: BagNet(width),
        arrange=_standardise(dataset, _three_channels),
        dataset=dataset,
        batch_size=batch_size,
        steps=round(epochs * len(dataset.train) / batch_size),
        learning_rates=(1e-3, 3e-3, 1e-2),
        curve_examples=500,
    )


def make_language_task(dataset: Dataset, *, width: int, depth: int, epochs: float, batch_size: int) -> Task:
    """Return a language model on characters, or on pixels."""
    tokens = dataset.train.inputs.shape[1]
    return Task(
        name=f"language model on {dataset.name}",
        network=f"language model, width {width}, depth {depth}, {tokens} tokens, {dataset.classes} characters",
        build=lambda: LanguageModel(width, depth, dataset.classes, tokens),
        arrange=lambda numbers: numbers,
        dataset=dataset,
        batch_size=batch_size,
        steps=round(epochs * len(dataset.train) / batch_size),
        learning_rates=(1e-3, 3e-3, 1e-2),
        # Each is a whole sequence of predictions.
        curve_examples=200,
    )


def make_quick_tasks(digits: Dataset, pixels: Dataset) -> tuple[Task, ...]:
    """Return small networks on the bundled digits, their small layers converted too: they have hardly any others."""
    tasks = (
        make_perceptron_task(digits, hidden=512, epochs=10, batch_size=128),
        make_transformer_task(digits, width=128, depth=2, side=2, heads=4, epochs=4, batch_size=64),
        make_bagnet_task(digits, width=8, epochs=4, batch_size=64),
        make_language_task(pixels, width=64, depth=2, epochs=3, batch_size=64),
    )
    return tuple(replace(task, skip_small=False, evaluations=6, noise_points=2) for task in tasks)


def make_full_tasks(dataset: Dataset) -> tuple[Task, ...]:
    """Return the networks for what a path held."""
    if dataset.kind == "table":
        perceptron = make_perceptron_task(dataset, hidden=500, epochs=3, batch_size=128)
        return (
            # Its trainings take seconds.
            replace(perceptron, sweeps=True),
            make_perceptron_task(dataset, hidden=1024, epochs=3, batch_size=256, name="wide MLP"),
        )
    if dataset.kind == "folder":
        return (
            make_transformer_task(dataset, width=256, depth=2, side=4, heads=4, epochs=0.6, batch_size=64),
            make_bagnet_task(dataset, width=8, epochs=0.6, batch_size=64),
        )
    return (make_language_task(dataset, width=256, depth=2, epochs=0.2, batch_size=16),)
