"""Squared gradients of single examples against loops, and estimates of them by enumeration of all random signs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from cheapgrad.planning import controller_gradients
from cheapgrad.planning.controller_gradients import Factors

EXAMPLES = 5


def _factors(rows: int, outputs: int, inputs: int) -> Factors:
    generator = torch.Generator().manual_seed(rows)
    kept = torch.randperm(EXAMPLES * rows, generator=generator)[: EXAMPLES * rows * 2 // 3]
    grad, stored = (
        torch.randn(len(kept), size, generator=generator, dtype=torch.float64) for size in (outputs, inputs)
    )
    return Factors(grad, stored, kept // rows, kept % rows, EXAMPLES, rows)


def _gradients(factors: Factors, weight_K: Tensor) -> Tensor:
    gradients = torch.zeros(EXAMPLES, factors.grad_KO.shape[1], factors.stored_KI.shape[1], dtype=torch.float64)
    for row, place in enumerate(factors.place_K.tolist()):
        gradients[place] += weight_K[row] * torch.outer(factors.grad_KO[row], factors.stored_KI[row])
    return gradients


def _all_signs(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Let the estimates see every vector of signs once: their mean over all is then their expectation."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=size)), dtype=torch.float64).mT
    monkeypatch.setattr(controller_gradients, "_draw_signs", lambda like, columns, generator: signs)


@pytest.mark.parametrize("rows", [1, 6])
def test_few_rows_are_squared_exactly(rows: int) -> None:
    factors = _factors(rows, 3, 4)
    weight_K = torch.rand(len(factors.place_K), dtype=torch.float64)
    for weight in (torch.ones_like(weight_K), weight_K):
        expected = _gradients(factors, weight).square().sum((1, 2))
        torch.testing.assert_close(factors.example_squares(torch.Generator(), weight), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("outputs", "inputs"), [(4, 3), (3, 4)])
def test_many_rows_are_estimated_without_bias(outputs: int, inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    factors = _factors(24, outputs, inputs)
    weight_K = torch.rand(len(factors.place_K), dtype=torch.float64)
    _all_signs(monkeypatch, 4)
    expected = _gradients(factors, weight_K).square().sum((1, 2))
    torch.testing.assert_close(factors.example_squares(torch.Generator(), weight_K), expected, rtol=1e-12, atol=0)


def test_the_square_of_the_sum_is_estimated_without_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = _factors(6, 4, 3)
    weight_K = torch.rand(len(factors.place_K), dtype=torch.float64)
    _all_signs(monkeypatch, 4)
    expected = _gradients(factors, weight_K).sum(0).square().sum()
    torch.testing.assert_close(factors.square_of_sum(torch.Generator(), weight_K), expected, rtol=1e-12, atol=0)


def test_random_signs_are_signs() -> None:
    signs = controller_gradients._draw_signs(torch.zeros(3, 500), 4, torch.Generator().manual_seed(0))
    assert signs.shape == (500, 4)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert signs.mean(0).abs().max() < 0.2
