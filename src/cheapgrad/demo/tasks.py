"""The pieces of the demo's work that do not depend on each other, as functions of plain values."""

from __future__ import annotations

import io

import torch
from torch import nn

from cheapgrad.demo.data import load_data
from cheapgrad.demo.methods import EXACT, Method
from cheapgrad.demo.noise import Noise, NoiseMeter
from cheapgrad.demo.setups import Setup
from cheapgrad.demo.training import measure_accuracy, train


def train_and_test(setup: Setup, method: Method, seed: int) -> float:
    """Return the test accuracy after one training."""
    data = load_data()
    return measure_accuracy(train(setup, method, data, seed), data)


def train_half_way(setup: Setup) -> bytes:
    """Return the weights after the first half of the exact training of seed 0.

    Variances depend on the weights: at the beginning all examples matter alike, later a few matter most.
    """
    buffer = io.BytesIO()
    torch.save(train(setup, EXACT, load_data(), seed=0, steps=setup.steps // 2).state_dict(), buffer)
    return buffer.getvalue()


def measure_noise(setup: Setup, method: Method, weights: bytes, draws: int) -> Noise:
    """Return variance and bias of a method's gradient at the given weights, on one batch."""
    data = load_data()
    model: nn.Module = setup.build_seeded(0)
    model.load_state_dict(torch.load(io.BytesIO(weights), weights_only=True))
    batch = slice(setup.audit_batch_size)
    return NoiseMeter(setup, model, data.train_pictures[batch], data.train_classes[batch]).measure(method, draws)
