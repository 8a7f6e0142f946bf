"""How much trained networks' mini-batches over-state their curvature, and when a larger batch is the better cure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from cheapgrad.curvature import DenseOperator, GaussNewton
from cheapgrad.curvature.conjugate_gradient import ConjugateGradientSettings
from cheapgrad.curvature.debiased_conjugate_gradient import BatchQuadratic, debiased_conjugate_gradient
from cheapgrad.curvature.directional_estimates import measure_curvature_along
from cheapgrad.curvature.split_sample import split_sample
from cheapgrad.demo.data import load_data

DIRECTIONS = 20
BATCH, MEASURED, PART = 64, 256, 16
STEPS = 16
LOSS = nn.CrossEntropyLoss()


def make_mlp() -> nn.Module:
    """Return a perceptron of 1,990 parameters for the digits."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 10))


def make_cnn() -> nn.Module:
    """Return a convolutional network of 1,898 parameters for the digits."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {"MLP": make_mlp, "CNN": make_cnn}


def measure_bias(*, splits: int) -> Iterator[dict[str, Any]]:
    """Yield curvatures along a batch's own directions, as shares of those on all data, for both networks."""
    for name, model, data, full in _trained_networks():
        yield from _compare_with_all_data(name, model, data, full, splits)


def measure_debiased_steps(*, splits: int) -> Iterator[dict[str, Any]]:
    """Yield what conjugate gradients reach on all data: plain, debiased, and with one batch of double size."""
    for setting in REGRESSIONS:
        yield _compare_steps(*setting, splits)
    for name, model, data, full in _trained_networks():
        for batch in (BATCH, MEASURED):
            yield _compare_steps_on_network(name, model, data, full, batch, splits)


def _trained_networks() -> Iterator[tuple[str, nn.Module, tuple[Tensor, Tensor], DenseOperator]]:
    """Yield name, trained network, all data, and the Gauss-Newton matrix on them."""
    digits = load_data()
    data = digits.train_pictures.double(), digits.train_classes
    for name, make in NETWORKS.items():
        model = _train(make().double(), *data)
        yield name, model, data, DenseOperator(gauss_newton_matrix(model, data[0]))


def _train(model: nn.Module, pictures: Tensor, classes: Tensor, epochs: int = 20) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(classes)).split(64):
            optimizer.zero_grad()
            LOSS(model(pictures[index]), classes[index]).backward()
            optimizer.step()
    return model.eval()


def gauss_newton_matrix(model: nn.Module, pictures: Tensor) -> Tensor:
    """Return the Gauss-Newton matrix of cross-entropy, from every output's gradient: the truth to compare with."""
    parameters = {name: each.detach() for name, each in model.named_parameters()}

    def scores(values: dict[str, Tensor], picture: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (picture.unsqueeze(0),)).squeeze(0)

    total = torch.zeros(())
    for chunk in pictures.split(100):
        jacobian = torch.func.vmap(torch.func.jacrev(scores), in_dims=(None, 0))(parameters, chunk)
        rows_BCP = torch.cat([each.flatten(2) for each in jacobian.values()], -1)
        probabilities_BC = model(chunk).detach().softmax(1)
        # diag(p) - p pᵀ is the square of this root.
        means = (probabilities_BC.unsqueeze(2) * rows_BCP).sum(1, keepdim=True)
        root_NP = (probabilities_BC.sqrt().unsqueeze(2) * (rows_BCP - means)).flatten(0, 1)
        total = total + root_NP.T @ root_NP
    return total / len(pictures)


def _draw_split(
    model: nn.Module, data: tuple[Tensor, Tensor], first_size: int, second_size: int
) -> tuple[GaussNewton, GaussNewton]:
    """Return the Gauss-Newton matrices of two disjoint batches, the second one in micro-batches."""
    pictures, classes = data
    first, second = torch.randperm(len(classes))[: first_size + second_size].split([first_size, second_size])
    parts = [(pictures[index], classes[index]) for index in second.split(PART)]
    return GaussNewton(model, LOSS, (pictures[first], classes[first])), GaussNewton(model, LOSS, parts)


def _compare_with_all_data(
    name: str, model: nn.Module, data: tuple[Tensor, Tensor], full: DenseOperator, splits: int
) -> Iterator[dict[str, Any]]:
    """Yield curvatures along the batch's own directions as shares of those on all data, for all and for single ones."""
    loss = float(LOSS(model(data[0]).detach(), data[1]))
    found: dict[str, list[Tensor]] = {"same_batch": [], "held_out": [], "corrected": [], "full": []}
    for _ in track(range(splits), f"{name}: bias", transient=True):
        operators = _draw_split(model, data, BATCH, MEASURED)
        sample = split_sample(*operators, DIRECTIONS, population_size=len(data[1]))
        for key in ("same_batch", "held_out", "corrected"):
            found[key].append(getattr(sample, key))
        found["full"].append(measure_curvature_along(sample.directions_PK, full, full).same_batch)
    values = {key: torch.stack(each) for key, each in found.items()}
    for label, chosen in (("1 to 20", slice(0, 20)), ("1", slice(0, 1)), ("5", slice(4, 5)), ("20", slice(19, 20))):
        sums = {key: each[:, chosen].sum(1) for key, each in values.items()}
        yield {
            "benchmark": "bias",
            "network": name,
            "parameters": full.shape[0],
            "train_loss": loss,
            "batch": BATCH,
            "measured_on": MEASURED,
            "splits": splits,
            "directions": label,
            "same_batch_over_full": float(sums["same_batch"].sum() / sums["full"].sum()),
            "held_out_over_full": float(sums["held_out"].sum() / sums["full"].sum()),
            "corrected_over_full": float(sums["corrected"].sum() / sums["full"].sum()),
            "corrected_standard_error": _ratio_error(sums["corrected"], sums["full"]),
        }


def _ratio_error(above: Tensor, below: Tensor) -> float:
    """Return the standard error of a ratio of sums."""
    ratio = above.sum() / below.sum()
    return float((above - ratio * below).std() / below.mean() / math.sqrt(len(above)))


# Parameters, batch, noise, damping: cases that debiasing wins and cases that it loses.
REGRESSIONS = (
    (400, 200, 10.0, 1e-2),
    (400, 60, 10.0, 1e-2),
    (400, 60, 2.0, 1e-2),
    (200, 400, 2.0, 1e-3),
    (400, 200, 10.0, 1.0),
)


def _compare_steps(parameters: int, batch: int, noise: float, damping: float, splits: int) -> dict[str, Any]:
    """Return the mean of the population's quadratic after 16 steps, and at the best step, for the three ways."""
    weights = torch.ones(parameters, dtype=torch.float64) * math.sqrt(121 / parameters)
    population = BatchQuadratic(DenseOperator(torch.eye(parameters, dtype=torch.float64)), -weights)

    def draw() -> BatchQuadratic:
        inputs = torch.randn(batch, parameters, dtype=torch.float64)
        targets = inputs @ weights + noise * torch.randn(batch, dtype=torch.float64)
        return BatchQuadratic(DenseOperator(inputs.T @ inputs / batch), -inputs.T @ targets / batch)

    settings = ConjugateGradientSettings(iterations=STEPS, damping=damping, tolerance=0.0)
    paths = [debiased_conjugate_gradient(draw(), draw(), settings).evaluate(population) for _ in range(splits)]
    case = f"regression, P {parameters}, noise {noise:g}"
    return _summarise(case, batch, damping, paths)


def _compare_steps_on_network(
    name: str, model: nn.Module, data: tuple[Tensor, Tensor], full: DenseOperator, batch: int, splits: int
) -> dict[str, Any]:
    judge = BatchQuadratic(full, GaussNewton(model, LOSS, data).gradient())
    settings = ConjugateGradientSettings(iterations=STEPS, damping=1e-2, tolerance=0.0)
    paths = []
    for _ in track(range(splits), f"{name}: steps", transient=True):
        a, b = _draw_split(model, data, batch, batch)
        run = debiased_conjugate_gradient(BatchQuadratic(a, a.gradient()), BatchQuadratic(b, b.gradient()), settings)
        paths.append(run.evaluate(judge))
    return _summarise(f"{name} on digits", batch, settings.damping, paths)


def _summarise(case: str, batch: int, damping: float, paths: list[Any]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "benchmark": "debiased_steps",
        "case": case,
        "batch": batch,
        "damping": damping,
        "draws": len(paths),
    }
    ends, bests = {}, {}
    for name in ("same_batch", "debiased", "double_size"):
        length = max(len(getattr(path, name)) for path in paths)
        # A run that converged early stays where it is.
        rows = [
            torch.cat([each, each[-1:].expand(length - len(each))]) for each in (getattr(path, name) for path in paths)
        ]
        mean = torch.stack(rows).mean(0)
        ends[name], bests[name] = float(mean[-1]), float(mean.min())
        record |= {f"{name}_end": ends[name], f"{name}_best": bests[name]}
    return record | {
        "lowest_at_the_end": min(ends, key=ends.__getitem__),
        "lowest_at_the_best_step": min(bests, key=bests.__getitem__),
    }
