"""Sampling designs, by enumeration of every outcome: no statistics, float64, relative tolerance 1e-12."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cheapgrad.sketch import (
    OrderedPivotal,
    Pivotal,
    Poisson,
    Systematic,
    WinnerTakeAll,
    WithReplacement,
    random,
    water_filling,
)
from tests.sketch.enumeration import enumerate_design

SCORES = {
    "flat 4": [1.0, 1.0, 1.0, 1.0],
    "flat 6": [1.0] * 6,
    "skewed 5": [5.0, 2.0, 1.0, 0.5, 0.25],
    "skewed 6": [1.0, 2.0, 3.0, 4.0, 5.0, 6.5],
    "duplicates 6": [2.0, 2.0, 1.0, 1.0, 1.0, 0.3],
    "dominant 5": [100.0, 1.0, 2.0, 1.5, 0.7],
    "zeros 5": [0.0, 2.0, 0.0, 1.0, 3.0],
    "one 1": [2.0],
    "two 2": [2.0, 1.0],
}
LARGE = {
    "skewed 7": [0.3, 1.0, 2.2, 3.1, 4.0, 0.9, 1.7],
    "skewed 8": [0.3, 1.0, 2.2, 3.1, 4.0, 0.9, 1.7, 0.2],
    "flat 8": [1.0] * 8,
}
LONG = {
    "skewed 30": [0.05 + (7 * atom % 30 / 30) ** 3 for atom in range(30)],
    "flat 21": [1.0] * 21,
}
FIXED = (Systematic(), Pivotal(), OrderedPivotal())
SHUFFLED = (Systematic(), Pivotal())
IN_ORDER = Systematic(permute=False)
FREE = (Poisson(), WithReplacement(), WinnerTakeAll())


def _cases(designs, table, counts=None):
    return [
        pytest.param(design, scores, count, id=f"{design!r}, {name}, {count}")
        for design in designs
        for name, scores in table.items()
        for count in counts or range(1, len(scores) + 1)
        if not _takes_long(design, len(scores), count)
    ]


def _takes_long(design, size, count):
    if isinstance(design, (WithReplacement, WinnerTakeAll)):
        return size**count > 5000
    return isinstance(design, Pivotal) and size == 6 and count in {1, 4}


SMALL_CASES = [*_cases(FIXED, SCORES), *_cases(FREE, SCORES)]
IN_ORDER_CASES = [*_cases((IN_ORDER,), SCORES | LARGE), *_cases((IN_ORDER,), LONG, (2, 7, 13))]
LARGE_CASES = [
    *_cases((Systematic(),), LARGE, (3,)),
    *_cases((OrderedPivotal(),), LARGE, (3, 5)),
    *_cases((Poisson(),), LARGE, (3,)),
]


def _atoms(scores):
    """Return atoms ``[n, 4]`` that are correlated, and zero where the score is: then every design is unbiased."""
    generator = np.random.default_rng(7)
    atoms = generator.normal(size=(len(scores), 4)) + 2.0 * generator.normal(size=(1, 4))
    return atoms * (scores.numpy()[:, None] > 0)


@pytest.mark.parametrize(("design", "scores", "count"), [*SMALL_CASES, *LARGE_CASES, *IN_ORDER_CASES])
def test_probability_mean_and_variance_are_exact(design, scores, count, monkeypatch):
    scores = torch.tensor(scores, dtype=torch.float64)
    outcomes = enumerate_design(design, scores, count, monkeypatch)
    assert outcomes.chances.sum() == pytest.approx(1, rel=1e-12)

    atoms = _atoms(scores)
    truth = atoms.sum(0)
    estimates = outcomes.weights @ atoms
    np.testing.assert_allclose(outcomes.chances @ estimates, truth, rtol=1e-12, atol=1e-13)

    measured = outcomes.chances @ ((estimates - truth) ** 2).sum(1)
    atoms = torch.as_tensor(atoms)
    stated = design.variance(atoms.square().sum(1), scores, count, lambda weights: (weights @ atoms).square().sum())
    scale = float(atoms.square().sum())
    assert float(stated) == pytest.approx(measured, rel=1e-12, abs=1e-13 * scale)


@pytest.mark.parametrize(
    ("design", "scores", "count"),
    [
        *_cases(FIXED, SCORES),
        *_cases((Systematic(),), LARGE, (3,)),
        *_cases((OrderedPivotal(),), LARGE, (3, 5)),
        *IN_ORDER_CASES,
    ],
)
def test_fixed_designs_have_the_size_and_the_marginals(design, scores, count, monkeypatch):
    scores = torch.tensor(scores, dtype=torch.float64)
    outcomes = enumerate_design(design, scores, count, monkeypatch)
    assert (outcomes.sizes == count).all()
    marginals = outcomes.chances @ (outcomes.weights > 0)
    np.testing.assert_allclose(marginals, water_filling(scores, count), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("design", "scores", "count"),
    [*_cases(FIXED, SCORES), *_cases((Systematic(),), LARGE, (3,)), *_cases((OrderedPivotal(),), LARGE, (3, 5))],
)
def test_joint_inclusion_is_exact(design, scores, count, monkeypatch):
    scores = torch.tensor(scores, dtype=torch.float64)
    outcomes = enumerate_design(design, scores, count, monkeypatch)
    drawn = outcomes.weights > 0
    measured = (drawn * outcomes.chances[:, None]).T @ drawn
    np.testing.assert_allclose(design.joint_inclusion(water_filling(scores, count)), measured, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("design", "scores", "count"), _cases((Poisson(),), SCORES))
def test_poisson_has_the_marginals_and_the_mean_size(design, scores, count, monkeypatch):
    scores = torch.tensor(scores, dtype=torch.float64)
    outcomes = enumerate_design(design, scores, count, monkeypatch)
    marginals = outcomes.chances @ (outcomes.weights > 0)
    np.testing.assert_allclose(marginals, water_filling(scores, count), rtol=1e-12, atol=1e-15)
    assert outcomes.chances @ outcomes.sizes == pytest.approx(min(count, len(scores)), rel=1e-12)


def test_winner_take_all_keeps_its_head_in_every_outcome(monkeypatch):
    scores = torch.tensor([9.0, 1.0, 8.0, 1.0, 2.0], dtype=torch.float64)
    outcomes = enumerate_design(WinnerTakeAll(), scores, 4, monkeypatch)
    np.testing.assert_array_equal(outcomes.weights[:, [0, 2]], 1.0)


@pytest.mark.parametrize("design", FIXED, ids=repr)
def test_no_fixed_design_beats_water_filling_and_ours_reach_it_on_orthogonal_atoms(design, monkeypatch):
    scores = torch.tensor(SCORES["skewed 6"], dtype=torch.float64)
    outcomes = enumerate_design(design, scores, 3, monkeypatch)
    atoms = np.diag(scores.numpy())
    errors = ((outcomes.weights @ atoms - scores.numpy()) ** 2).sum(1)
    probabilities = water_filling(scores, 3)
    optimum = float(((1 / probabilities - 1) * scores**2).sum())
    assert outcomes.chances @ errors == pytest.approx(optimum, rel=1e-12)


@pytest.mark.parametrize("design", SHUFFLED, ids=repr)
@pytest.mark.parametrize("size", [9, 12, 30])
@pytest.mark.parametrize("flat", [True, False])
def test_beyond_enumeration_the_variance_is_exact_for_flat_scores_and_for_orthogonal_atoms(design, size, flat):
    generator = torch.Generator().manual_seed(size)
    count = size // 3
    scores = torch.ones(size, dtype=torch.float64) if flat else 0.1 + torch.rand(size, generator=generator).double()
    probabilities = water_filling(scores, count)
    if flat:
        # Simple random sampling: the textbook variance, with the finite-population correction.
        atoms = torch.randn(size, 3, generator=generator, dtype=torch.float64) + 1
        spread = (atoms - atoms.mean(0)).square().sum() / (size - 1)
        truth = size**2 * (1 - count / size) * spread / count
    else:
        atoms = torch.diag(scores)
        truth = ((1 / probabilities - 1) * scores**2).sum()
    stated = design.variance(atoms.square().sum(1), scores, count, lambda weights: (weights @ atoms).square().sum())
    assert float(stated) == pytest.approx(float(truth), rel=1e-9)


def test_in_order_there_are_no_joint_probabilities_of_all_orders():
    assert IN_ORDER.joint_inclusion(torch.full((4,), 0.5, dtype=torch.float64)) is None


def _variance(design, atoms, count):
    scores = torch.ones(len(atoms), dtype=torch.float64)
    return float(
        design.variance(atoms.square().sum(1), scores, count, lambda weights: (weights @ atoms).square().sum())
    )


@pytest.mark.parametrize("in_order", [IN_ORDER, OrderedPivotal()], ids=repr)
def test_neighbours_that_resemble_each_other_are_spread_in_order(in_order):
    atoms = torch.arange(24, dtype=torch.float64).div(4).floor().sin().unsqueeze(1)
    assert _variance(in_order, atoms, 6) < 1e-12 < _variance(Systematic(), atoms, 6)


def test_a_period_of_the_atoms_is_in_step_with_systematic_sampling_only():
    atoms = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).repeat(20, 1)
    shuffled, in_order, pivotal = (
        _variance(design, atoms, 20) for design in (Systematic(), IN_ORDER, OrderedPivotal())
    )
    assert in_order > 15 * shuffled
    # One atom of every pair, whichever: independent fair signs of size 2, twenty of them.
    assert pivotal == pytest.approx(20 * 4)
    assert pivotal < 2 * shuffled


def test_in_order_the_variance_of_many_atoms_is_a_quadrature(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    scores = 0.1 + torch.rand(300, generator=generator, dtype=torch.float64)
    atoms = torch.randn(300, 5, generator=generator, dtype=torch.float64) * scores.unsqueeze(1)
    outcomes = enumerate_design(IN_ORDER, scores, 40, monkeypatch)
    errors = (outcomes.weights @ atoms.numpy() - atoms.numpy().sum(0)) ** 2
    stated = IN_ORDER.variance(atoms.square().sum(1), scores, 40, lambda weights: (weights @ atoms).square().sum())
    assert float(stated) == pytest.approx(outcomes.chances @ errors.sum(1), rel=0.05)


def test_ordered_pivotal_states_the_variance_of_many_atoms_from_draws():
    generator = torch.Generator().manual_seed(2)
    scores = 0.1 + torch.rand(300, generator=generator, dtype=torch.float64)
    atoms = torch.randn(300, 200, generator=generator, dtype=torch.float64) * scores.unsqueeze(1)
    design = OrderedPivotal()
    selection = design.draw(scores.expand(4000, 300), 40, generator=generator)
    weights = torch.zeros(4000, 300, dtype=torch.float64).scatter(1, selection.index_K, selection.weight_K)
    measured = (weights @ atoms - atoms.sum(0)).square().sum(1).mean()
    stated = design.variance(atoms.square().sum(1), scores, 40, lambda weights: (weights @ atoms).square().sum())
    assert float(stated) == pytest.approx(float(measured), rel=0.05)


@pytest.mark.parametrize("rank", [0, 1, 7])
def test_all_ranks_state_one_law(rank, monkeypatch):
    scores = torch.arange(1.0, 301, dtype=torch.float64)
    atoms = scores.unsqueeze(1) * torch.ones(1, 3)
    one, found = [], []
    for salt, numbers in ((None, one), (rank, found)):
        monkeypatch.setattr(random, "_salt", lambda salt=salt: salt)
        variance = OrderedPivotal().variance(
            atoms.square().sum(1), scores, 40, lambda weights: (weights @ atoms).square().sum()
        )
        numbers.append(float(variance))
    assert found == one


@pytest.mark.parametrize("design", [*FIXED, IN_ORDER, *FREE], ids=repr)
def test_several_draws_at_once_equal_single_draws_from_the_same_numbers(design, monkeypatch):
    scores = torch.rand(3, 6, dtype=torch.float64)
    numbers = torch.rand(3, 64, dtype=torch.float64)

    def fed(like, shape, *, double=True, generator=None):
        return numbers[row, : shape[-1]] if row is not None else numbers[:, : shape[-1]]

    monkeypatch.setattr(random, "uniform", fed)
    monkeypatch.setattr(random, "permutation", lambda like, shape, **options: fed(like, shape).argsort(-1))
    row = None
    together = design.draw(scores, 3)
    for row in range(3):
        single = design.draw(scores[row], 3)
        expected = torch.zeros(6, dtype=torch.float64).index_add(0, single.index_K, single.weight_K)
        found = torch.zeros(6, dtype=torch.float64).index_add(0, together.index_K[row], together.weight_K[row])
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("design", [Systematic(), IN_ORDER, OrderedPivotal()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("lines", [0, 2])
def test_probabilities_of_other_precisions_draw_as_their_values_do(design, dtype, lines):
    generator = torch.Generator().manual_seed(3)
    for size, count in ((1, 1), (7, 3), (300, 40)):
        wide = water_filling(torch.rand(size, generator=generator, dtype=torch.float64), count)
        probabilities = wide.to(dtype)
        for numbers in torch.rand(20, 2 * size, generator=generator, dtype=torch.float64):
            randomness = (numbers,)
            if isinstance(design, Systematic):
                randomness = (numbers[:size].argsort(), numbers[-1:]) if design.permute else (numbers[-1:],)
            if lines:
                randomness = tuple(part.expand(lines, -1) for part in randomness)
                probabilities = probabilities.expand(lines, -1)
            index = design.select(probabilities, randomness, count)
            assert torch.equal(index, design.select(probabilities.double(), randomness, count))
            assert all(len(line.unique()) == count for line in index.view(-1, count))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("design", [Systematic(), IN_ORDER, OrderedPivotal()], ids=repr)
@pytest.mark.parametrize("size", [0, 5])
@pytest.mark.parametrize("lines", [(), (2,)])
def test_nothing_is_drawn_of_nothing_without_a_warning(design, size, lines):
    probabilities = torch.zeros(*lines, size, dtype=torch.float64)
    index = design.select(probabilities, design.draw_randomness(probabilities, None), 0)
    assert index.shape == (*lines, 0)
    assert index.dtype == torch.int64


# The first and last number of the door where ranks are folded in.
@pytest.mark.parametrize("start", [2.0**-33, 1 - 2.0**-33])
@pytest.mark.parametrize("seed", range(20))
def test_the_ends_of_the_unit_interval_keep_systematic_at_its_size(start, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(200, generator=generator, dtype=torch.float64) ** 6
    probabilities = water_filling(scores, 37)
    order = torch.randperm(200, generator=generator)
    index = Systematic().select(probabilities, (order, torch.tensor([start], dtype=torch.float64)), 37)
    assert index.unique().shape == (37,)
    assert (probabilities[index] > 0).all()


@pytest.mark.parametrize("design", [Systematic(), IN_ORDER, OrderedPivotal()], ids=repr)
@pytest.mark.parametrize("kind", ["spread", "steep", "equal", "zeros"])
def test_one_line_alone_is_drawn_as_among_others(design, kind):
    generator = torch.Generator().manual_seed(7)
    shapes = {
        "spread": lambda s: s,
        "steep": lambda s: s**8,
        "equal": torch.ones_like,
        "zeros": lambda s: s * (s > 0.6),
    }
    for _ in range(200):
        size = int(torch.randint(1, 60, (), generator=generator))
        count = int(torch.randint(1, size + 1, (), generator=generator))
        probabilities = water_filling(shapes[kind](torch.rand(size, generator=generator, dtype=torch.float64)), count)
        numbers = torch.rand(2 * size, generator=generator, dtype=torch.float64)
        randomness = (numbers,)
        if isinstance(design, Systematic):
            randomness = (numbers[:size].argsort(), numbers[-1:]) if design.permute else (numbers[-1:],)
        alone = design.select(probabilities, randomness, count)
        among = design.select(probabilities.expand(2, -1), tuple(part.expand(2, -1) for part in randomness), count)
        # Where the order of a draw means nothing, it may differ.
        assert torch.equal(alone.sort().values, among[0].sort().values)
        assert torch.equal(among[0], among[1])
