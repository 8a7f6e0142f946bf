"""What added variance does to Adam's second moment, and its correction."""

from __future__ import annotations

import pytest
import torch

from cheapgrad.errors import ControlError
from cheapgrad.planning.adam_correction import adam_learning_rate_factor


@pytest.mark.parametrize(("noise", "signal"), [(0.5, 0.0), (0.5, 1.0), (2.0, 0.5)])
def test_the_factor_restores_the_length_of_adams_steps(noise: float, signal: float) -> None:
    """Torch's Adam on noisy gradients: the root of its second moment, with and without added variance."""
    generator, size, steps = torch.Generator().manual_seed(0), 4000, 600
    roots = []
    for variance in (1.0, 1.0 + noise):
        parameter = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
        optimizer = torch.optim.Adam([parameter], lr=0.0, betas=(0.9, 0.99), eps=0.0)
        for _ in range(steps):
            draws = torch.randn(size, generator=generator, dtype=torch.float64)
            parameter.grad = signal + variance**0.5 * draws
            optimizer.step()
        roots.append(optimizer.state[parameter]["exp_avg_sq"].mean().sqrt())
    share = 1 / (1 + signal**2)
    measured = float(roots[1] / roots[0])
    assert measured == pytest.approx(adam_learning_rate_factor(noise, share), rel=0.01)
    assert measured > 1.05


@pytest.mark.parametrize(
    ("noise", "share", "name"), [(-0.1, 1.0, "noise"), (0.1, 1.5, "noise_share"), ("a", 1, "noise")]
)
def test_numbers_out_of_range_are_named(noise: float, share: float, name: str) -> None:
    with pytest.raises(ControlError, match=f"{name} must be"):
        adam_learning_rate_factor(noise, share)
