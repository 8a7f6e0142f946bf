"""The door of randomness: uniform, reproducible, and different on every rank under equal seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from cheapgrad.sketch import OrderedPivotal, Pivotal, Poisson, Systematic, WinnerTakeAll, WithReplacement, random

LIKE = torch.zeros(1)
SAMPLE = 200_000
# Kolmogorov-Smirnov: a false alarm once in a million.
SMALLEST_P = 1e-6


@pytest.fixture
def on_rank(monkeypatch):
    """Return a function that lets this process be a rank of a group (or None: no group)."""
    return lambda rank: monkeypatch.setattr(random, "_salt", lambda: rank)


def _draw(on_rank, rank, seed=0, draw=random.uniform, shape=(SAMPLE,), **options):
    on_rank(rank)
    torch.manual_seed(seed)
    return draw(LIKE, shape, **options)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("rank", [None, 0, 1, 7, 1023])
def test_uniform_on_every_rank(rank, double, on_rank):
    numbers = _draw(on_rank, rank, double=double)
    assert numbers.dtype == (torch.float64 if double else torch.float32)
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    assert stats.kstest(numbers.double().numpy(), "uniform").pvalue > SMALLEST_P
    # Neighbours in the stream are independent too.
    pairs = np.histogram2d(numbers[::2], numbers[1::2], bins=16, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(pairs.ravel()).pvalue > SMALLEST_P


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 2), (0, 1023), (6, 7)])
def test_equal_seeds_on_two_ranks_give_independent_numbers(first, second, double, on_rank):
    one, two = (_draw(on_rank, rank, double=double).numpy() for rank in (first, second))
    assert (one != two).mean() > 0.999
    joint = np.histogram2d(one, two, bins=16, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(joint.ravel()).pvalue > SMALLEST_P
    assert stats.kstest((one - two) % 1.0, "uniform").pvalue > SMALLEST_P


def test_equal_seeds_on_one_rank_give_equal_numbers(on_rank):
    assert torch.equal(_draw(on_rank, 3), _draw(on_rank, 3))
    assert not torch.equal(_draw(on_rank, 3), _draw(on_rank, 3, seed=1))


def test_all_ranks_take_the_same_number_of_steps_of_the_generator(on_rank):
    states = []
    for rank in (0, 1, 5):
        _draw(on_rank, rank, shape=(11,))
        states.append(torch.random.get_rng_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


@pytest.mark.parametrize(
    "design", [Systematic(), Pivotal(), OrderedPivotal(), Poisson(), WithReplacement(), WinnerTakeAll()], ids=repr
)
def test_designs_differ_between_ranks(design, on_rank):
    scores = torch.linspace(1, 2, 40, dtype=torch.float64)
    drawn = {}
    for rank in (0, 1):
        on_rank(rank)
        torch.manual_seed(0)
        drawn[rank] = [tuple(design.draw(scores, 10).index_K.tolist()) for _ in range(5)]
    assert all(first != second for first, second in zip(drawn[0], drawn[1], strict=True))


@pytest.mark.parametrize("salt", [0, 1, 2, 12345])
def test_mixing_is_one_to_one(salt):
    sample = torch.cat(
        [
            torch.arange(100_000),
            torch.arange(2**32 - 100_000, 2**32),
            torch.arange(0, 2**32, 65_537),
            torch.arange(2**31 - 1000, 2**31 + 1000),
        ]
    ).unique()
    mixed = random._mix_bits(sample, salt)
    assert mixed.unique().shape == sample.shape
    assert int(mixed.min()) >= 0
    assert int(mixed.max()) < 2**32


@pytest.mark.parametrize("salt", [0, 1, 77])
def test_mixing_can_be_undone(salt):
    """Every step has an inverse, so the whole is a bijection on all of 32 bits."""
    bits = torch.randint(0, 2**32, (10_000,))
    undone = _invert_shift(random._mix_bits(bits, salt), 15)
    for multiplier in (0x297A2D39, 0x2C1B3C6D, 0x7FEB352D):
        inverse = pow(multiplier, -1, 2**32)
        undone = torch.tensor([value * inverse % 2**32 for value in undone.tolist()])
        undone = _invert_shift(undone, 16)
    assert torch.equal(undone ^ ((salt * 0x9E3779B1) % 2**32), bits)


def _invert_shift(bits, shift):
    """Undo ``bits ^ (bits >> shift)``."""
    found = bits
    for _ in range(32 // shift + 1):
        found = bits ^ (found >> shift)
    return found


@pytest.mark.parametrize("rank", [None, 0, 2])
@pytest.mark.parametrize(
    "draw",
    [
        lambda generator: random.uniform(LIKE, (50,), generator=generator),
        lambda generator: random.signs(LIKE, (50,), generator=generator),
        lambda generator: random.normal(LIKE, (50,), generator=generator),
        lambda generator: random.integers(LIKE, 9, (50,), generator=generator),
        lambda generator: random.permutation(LIKE, (50,), generator=generator),
    ],
    ids=["uniform", "signs", "normal", "integers", "permutation"],
)
def test_a_generator_is_honoured_and_the_default_one_left_alone(draw, rank, on_rank):
    on_rank(rank)
    state = torch.random.get_rng_state()
    first, second = (draw(torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, draw(torch.Generator().manual_seed(5)))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("rank", [None, 1])
def test_signs_are_fair(rank, on_rank):
    negative = int(_draw(on_rank, rank, draw=random.signs).sum())
    assert stats.binomtest(negative, SAMPLE).pvalue > SMALLEST_P


@pytest.mark.parametrize("rank", [None, 1])
def test_normal_numbers_are_normal(rank, on_rank):
    numbers = _draw(on_rank, rank, draw=random.normal)
    assert torch.isfinite(numbers).all()
    assert stats.kstest(numbers.double().numpy(), "norm").pvalue > SMALLEST_P


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("high", [1, 2, 7, 1000])
def test_integers_are_uniform(rank, high, on_rank):
    on_rank(rank)
    counts = torch.bincount(random.integers(LIKE, high, (SAMPLE,)), minlength=high)
    assert counts.shape == (high,)
    assert high == 1 or stats.chisquare(counts.numpy()).pvalue > SMALLEST_P


@pytest.mark.parametrize("rank", [None, 0, 1])
@pytest.mark.parametrize("stack", [(), (3,)], ids=["one", "stack"])
def test_all_orders_are_alike(rank, stack, on_rank):
    on_rank(rank)
    torch.manual_seed(3)
    orders = torch.stack([random.permutation(LIKE, (*stack, 4)).view(-1, 4)[0] for _ in range(12_000)])
    found, counts = (orders * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)
    assert found.shape == (24,)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(4).expand(12_000, 4))
    assert stats.chisquare(counts.numpy()).pvalue > SMALLEST_P


def test_orders_differ_between_ranks_under_equal_seeds(on_rank):
    drawn = [_draw(on_rank, rank, draw=random.permutation, shape=(40,)) for rank in (0, 1)]
    assert not torch.equal(*drawn)


def test_the_rank_is_not_folded_in_without_a_group():
    torch.manual_seed(9)
    plain = torch.rand(5, dtype=torch.float64)
    torch.manual_seed(9)
    assert torch.equal(random.uniform(LIKE, (5,)), plain)
