"""The bias, and its removal, on networks trained on the digits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cheapgrad.curvature import DenseOperator, GaussNewton, measure_curvature_along, split_sample
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


@pytest.mark.parametrize("name", NETWORKS)
def test_same_batch_overstates_and_corrected_does_not(name):
    digits = load_data()
    pictures, classes = digits.train_pictures[:POPULATION].double(), digits.train_classes[:POPULATION]
    model = train(NETWORKS[name]().double(), pictures, classes)
    full = DenseOperator(GaussNewton(model, LOSS, (pictures, classes)).to_dense())
    same, corrected, true = [], [], []
    for _ in range(SPLITS):
        first, second = torch.randperm(POPULATION)[: BATCH + MEASURED].split([BATCH, MEASURED])
        parts = [(pictures[index], classes[index]) for index in second.split(80)]
        operators = [GaussNewton(model, LOSS, batch) for batch in ((pictures[first], classes[first]), parts)]
        sample = split_sample(*operators, DIRECTIONS, population_size=POPULATION)
        same.append(sample.same_batch.sum())
        corrected.append(sample.corrected.sum())
        true.append(measure_curvature_along(sample.directions_PK, full, full).same_batch.sum())
    same, corrected, true = (torch.stack(each) for each in (same, corrected, true))
    assert same.sum() / true.sum() > 1.2
    assert float(corrected.sum() / true.sum()) == pytest.approx(1, abs=0.05)
    error = (corrected - true).std() / math.sqrt(SPLITS)
    assert (corrected - true).mean().abs() < 3 * error
    assert (same - true).mean() > 6 * error
