"""Noise in units of an optimizer's step: against the variance of AdamW's own steps, and where one layer hides it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.optimizer_noise import weigh_noise


def test_variance_of_the_steps_that_adamw_takes():
    torch.manual_seed(0)
    moments = torch.tensor([1.0, 1e-4, 1e-8])
    batch, added = torch.tensor([0.5, 2e-5, 1e-9]), torch.tensor([0.1, 3e-5, 0.0])

    def spread(variance, draws=4000):
        # The first step of AdamW from a second moment that is known, without momentum: -rate * g / (sqrt(v) + eps).
        steps = []
        for _ in range(draws):
            parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
            optimizer = torch.optim.AdamW([parameter], lr=1.0, betas=(0.0, 0.999999999), weight_decay=0.0)
            parameter.grad = torch.randn(3, dtype=torch.float64) * variance.double().sqrt()
            optimizer.state[parameter] = {
                "step": torch.tensor(1e12),
                "exp_avg": torch.zeros(3, dtype=torch.float64),
                "exp_avg_sq": (moments + added).double(),
            }
            optimizer.step()
            steps.append(parameter.detach().clone())
        return float(torch.stack(steps).var(0).sum())

    found = weigh_noise([batch], [added], [moments], epsilon=1e-8)
    measured = spread(added) / spread(batch)
    assert found.omega_adamw == pytest.approx(measured, rel=0.1)  # two sums of variances of 4000 draws: 3 % each
    assert abs(found.omega / measured - 1) > 0.5


def test_a_layer_of_most_variance_hides_the_others():
    head, body = torch.full((10,), 9.0), torch.full((90,), 0.1)
    found = weigh_noise([head, body], [torch.zeros(10), body / 2], [head, body], epsilon=0.0)
    assert (found.largest, found.its_share) == (0, pytest.approx(90 / 99))
    assert found.omega == pytest.approx(4.5 / 99)
    assert found.omega_of_others == pytest.approx(0.5)
    # v + s of the second: 0.15 an entry; of the first: 9.
    assert found.omega_adamw == pytest.approx((90 * 0.05 / 0.15) / (10 + 90 * 0.1 / 0.15))


def test_alike_where_all_entries_are_alike():
    variance = torch.full((7,), 0.3)
    found = weigh_noise([variance, variance], [variance / 5] * 2, [variance] * 2, epsilon=1e-8)
    assert found.omega == pytest.approx(0.2)
    assert found.omega_adamw == pytest.approx(0.2)
