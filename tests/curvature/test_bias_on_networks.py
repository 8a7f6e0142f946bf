"""The bias, and its removal, on networks trained on the digits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cheapgrad.curvature import (
    DenseOperator,
    GaussNewton,
    MeanOperator,
    MicroBatch,
    as_operator,
    measure_curvature_along,
    split_sample,
)
from cheapgrad.demo.data import load_data

POPULATION, BATCH, MEASURED, SPLITS, DIRECTIONS = 480, 32, 160, 40, 20
LOSS = nn.CrossEntropyLoss()
NETWORKS = {
    "MLP": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)),
    "CNN": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 6, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(54, 10)
    ),
}


def train(model, pictures, classes):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(8):
        for index in torch.randperm(len(classes)).split(32):
            optimizer.zero_grad()
            LOSS(model(pictures[index]), classes[index]).backward()
            optimizer.step()
    return model.eval()


class Rows:
    """The Gauss-Newton matrix ``(1/B) Σ_n J_nᵀ S_n S_nᵀ J_n`` of a batch, from the rows ``S_nᵀ J_n``."""

    dtype = torch.float64

    def __init__(self, rows_NCP):
        self.rows, self.count = rows_NCP.flatten(0, 1), len(rows_NCP)
        self.shape = (self.rows.shape[1],) * 2

    def __matmul__(self, columns):
        return self.rows.T @ (self.rows @ columns) / self.count


def rows_of(model, pictures):
    """Return them for all examples, computed once: many splits take their batches from them."""
    parameters = {name: each.detach() for name, each in model.named_parameters()}

    def outputs_of(values, picture):
        return torch.func.functional_call(model, values, (picture.unsqueeze(0),)).squeeze(0)

    jacobians = torch.func.vmap(torch.func.jacrev(outputs_of), in_dims=(None, 0))(parameters, pictures)
    p_NC = model(pictures).detach().softmax(1)
    roots_NCC = torch.diag_embed(p_NC.sqrt()) - p_NC[:, :, None] * p_NC.sqrt()[:, None, :]
    return roots_NCC.mT @ torch.cat([each.flatten(2) for each in jacobians.values()], 2)


def mean_of(rows_NCP, size):
    parts = [MicroBatch(as_operator(Rows(part)), len(part) / len(rows_NCP), len(part)) for part in rows_NCP.split(size)]
    return MeanOperator(parts)


@pytest.mark.parametrize("name", NETWORKS)
def test_same_batch_overstates_and_corrected_does_not(name):
    digits = load_data()
    pictures, classes = digits.train_pictures[:POPULATION].double(), digits.train_classes[:POPULATION]
    model = train(NETWORKS[name]().double(), pictures, classes)
    rows = rows_of(model, pictures)
    full = DenseOperator(mean_of(rows, POPULATION).to_dense())
    same, corrected, true = [], [], []
    for split in range(SPLITS):
        first, second = torch.randperm(POPULATION)[: BATCH + MEASURED].split([BATCH, MEASURED])
        operators = mean_of(rows[first], BATCH), mean_of(rows[second], 80)
        sample = split_sample(*operators, DIRECTIONS, population_size=POPULATION)
        same.append(sample.same_batch.sum())
        corrected.append(sample.corrected.sum())
        true.append(measure_curvature_along(sample.directions_PK, full, full).same_batch.sum())
        if split == 0:
            parts = [(pictures[index], classes[index]) for index in second.split(80)]
            operators = [GaussNewton(model, LOSS, batch) for batch in ((pictures[first], classes[first]), parts)]
            own = split_sample(*operators, DIRECTIONS, population_size=POPULATION)
            for estimate in ("same_batch", "held_out", "corrected", "standard_error"):
                torch.testing.assert_close(getattr(own, estimate), getattr(sample, estimate), rtol=1e-6, atol=1e-10)
    same, corrected, true = (torch.stack(each) for each in (same, corrected, true))
    assert same.sum() / true.sum() > 1.2
    assert float(corrected.sum() / true.sum()) == pytest.approx(1, abs=0.05)
    error = (corrected - true).std() / math.sqrt(SPLITS)
    assert (corrected - true).mean().abs() < 3 * error
    assert (same - true).mean() > 6 * error
