"""What measured passes show, by enumeration of coins and of draws; what is remembered of it."""

from __future__ import annotations

import itertools

import pytest
import torch

from cheapgrad.planning.controller_gradients import Factors
from cheapgrad.planning.controller_memory import recall, remember
from cheapgrad.planning.controller_pass import AllPass, Drawn, HalvesPass

B, T = 4, 3


def _tensors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    grad, stored = (torch.randn(B * T, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return grad * torch.rand(B * T, 1, generator=generator, dtype=torch.float64), stored


def _passes_by_coins() -> list[HalvesPass]:
    """Return a pass for every outcome of the coins, in which the sampled half keeps all rows, too."""
    grad, stored = _tensors()
    scores_BN, everything, seen = grad.norm(dim=1).view(B, T), torch.arange(B * T), {}
    for seed in range(60):
        current = HalvesPass(scores_BN, torch.Generator().manual_seed(seed))
        current.see_draw("layer", scores_BN, (0.5, 0.5), B * T // 2)
        current.see_product(Drawn(everything, torch.ones(B * T, dtype=torch.float64), T, True), grad, stored)
        seen[tuple(current.is_exact.tolist())] = current
    assert len(seen) == 4
    return list(seen.values())


def test_without_noise_there_is_no_gain_on_average_over_the_coins() -> None:
    gains, favouring = [], []
    for current in _passes_by_coins():
        gains.append(float(current.totals()[1] * current._sizes_in_units[1]))
        relative = current._squares[0] / current._sizes
        # The mistake: a weight that is larger where the exact gradient happens to be small.
        favouring.append(float(((relative[1] - relative[0]) / relative[0]).sum()))
    assert max(map(abs, gains)) > 1e-3
    assert sum(gains) == pytest.approx(0, abs=1e-12)
    assert sum(favouring) > 1e-3


def test_a_draws_own_noise_is_estimated_without_bias() -> None:
    grad, stored = _tensors()
    kept, noise = 6, []
    weight_K = torch.full((kept,), B * T / kept, dtype=torch.float64)
    for subset in itertools.combinations(range(B * T), kept):
        index_K = torch.tensor(subset)
        current = AllPass(B, torch.Generator(), grad.device)
        drawn = grad[index_K] * weight_K.unsqueeze(1)
        current.see_product("layer", Factors(drawn, stored[index_K], index_K // T, index_K % T, B, T), weight_K, 1.0)
        noise.append(current._noise["layer"])
    truth = ((B * T / kept - 1) * grad.square().sum(1) * stored.square().sum(1)).sum()
    torch.testing.assert_close(torch.stack(noise).mean(), truth, rtol=1e-12, atol=0)


@pytest.mark.parametrize("slope", [0.0, 0.01, -0.01])
def test_a_linear_trend_is_followed_without_a_lag(slope: float) -> None:
    memory = None
    for step in range(120):
        memory = remember(memory, torch.tensor([2 + slope * step, 1.0], dtype=torch.float64))
    assert memory is not None
    torch.testing.assert_close(
        recall(memory), torch.tensor([2 + slope * 119, 1.0], dtype=torch.float64), rtol=1e-4, atol=0
    )
    mean = float(memory[0, 0] / memory[0, -1])
    assert (abs(mean - 2 - slope * 119) > 0.03) == (slope != 0)


def test_what_is_recalled_stays_near_the_mean() -> None:
    memory = remember(None, torch.tensor([1.0], dtype=torch.float64))
    for _ in range(2):
        memory = remember(memory, torch.tensor([1e6], dtype=torch.float64))
    mean = memory[0, 0] / memory[0, 1]
    assert float(recall(memory)) <= 2 * float(mean)


def _left_by_a_draw_above(is_kept_BN: torch.Tensor) -> tuple[torch.Tensor, HalvesPass]:
    scores_BN = 1 + torch.rand(is_kept_BN.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    current = HalvesPass(scores_BN, torch.Generator().manual_seed(0))
    return torch.where(current.is_exact.unsqueeze(1) | is_kept_BN, scores_BN, 0.0), current


def test_a_draw_of_the_rows_that_are_left_follows_the_one_above() -> None:
    examples, rows = 16, 8
    is_kept_BN = (torch.arange(rows) < 2).expand(examples, rows)
    scores_BN, current = _left_by_a_draw_above(is_kept_BN)
    current.see_draw("same rows", scores_BN, (0.25, 0.5), examples // 2 * 2)
    current.see_draw("fewer rows", scores_BN, (0.1, 0.2), examples // 2)
    assert current.followers == {"same rows"}
    assert not current.curves


def test_a_draw_where_examples_are_left_has_noise_of_its_own() -> None:
    examples, rows = 16, 8
    # Attention spreads a cotangent over its example: an example is left out whole, or not at all.
    scores_BN, current = _left_by_a_draw_above((torch.arange(examples) % 5 == 0).unsqueeze(1).expand(examples, rows))
    current.see_draw("below attention", scores_BN, (0.06, 0.2), 4)
    assert not current.followers
    assert not current.curves
