"""Curvature from another batch against closed forms, which the batch's own curvature must fail."""

from __future__ import annotations

import math

import pytest
import torch

from cheapgrad.curvature import BatchReader, DenseOperator, GaussNewton, Hessian, MeanOperator, MicroBatch
from cheapgrad.curvature.directional_estimates import (
    DirectionalEstimates,
    combine_parts,
    measure_curvature_along,
    measure_slope_along,
)
from cheapgrad.curvature.finite_population import FinitePopulation
from cheapgrad.curvature.independence import check_disjoint, check_independent
from cheapgrad.curvature.split_sample import split_sample
from cheapgrad.errors import (
    BatchError,
    BudgetError,
    NonFiniteCurvatureError,
    OperandError,
    OverlapError,
    ShapeError,
    SingularCurvatureError,
)

# Draws are fixed beforehand; the biased estimator has to lie this many standard errors from the truth.
_BAND, _POWER = 3.0, 6.0


def distance(draws, truth):
    """Return how many standard errors the mean of the draws lies from the truth."""
    draws = torch.stack(draws).double()
    return float((draws.mean() - truth).abs() / (draws.std() / math.sqrt(len(draws))))


def covariance(rows_BP):
    return rows_BP.T @ rows_BP / len(rows_BP)


def micro_batched(rows_BP, parts):
    """The curvature ``XᵀX / B`` of linear regression, in equal micro-batches."""
    return MeanOperator([DenseOperator(covariance(part), example_count=len(part)) for part in rows_BP.chunk(parts)])


def spiked_rows(examples, parameters, spike):
    rows_BP = torch.randn(examples, parameters, dtype=torch.float64)
    rows_BP[:, 0] *= math.sqrt(spike)
    return rows_BP


@pytest.mark.parametrize(("parameters", "examples", "spike"), [(200, 400, 5.0), (200, 100, 10.0)])
def test_spiked_covariance(parameters, examples, spike):
    aspect = parameters / examples
    overlap = (1 - aspect / (spike - 1) ** 2) / (1 + aspect / (spike - 1))
    true_curvature = overlap * spike + 1 - overlap
    same, held, exact = [], [], []
    for _ in range(80):
        a, b = (spiked_rows(examples, parameters, spike) for _ in range(2))
        sample = split_sample(covariance(a), covariance(b), 1)
        same.append(sample.same_batch[0])
        held.append(sample.held_out[0])
        exact.append(1 + (spike - 1) * sample.directions_PK[0, 0] ** 2)
    assert distance(same, spike * (1 + aspect / (spike - 1))) < _BAND
    assert distance(exact, true_curvature) < _BAND
    assert distance(held, true_curvature) < _BAND
    assert distance(same, true_curvature) > _POWER


def wigner(parameters):
    noise_PP = torch.randn(parameters, parameters, dtype=torch.float64)
    return (noise_PP + noise_PP.T) / math.sqrt(2 * parameters)


@pytest.mark.parametrize(("spike", "parameters"), [(3.0, 200), (1.5, 400)])
def test_spiked_wigner(spike, parameters):
    same, held = [], []
    signal_PP = torch.zeros(parameters, parameters, dtype=torch.float64)
    signal_PP[0, 0] = spike
    for _ in range(50):
        sample = split_sample(signal_PP + wigner(parameters), signal_PP + wigner(parameters), 1)
        same.append(sample.same_batch[0])
        held.append(sample.held_out[0])
    assert distance(same, spike + 1 / spike) < _BAND
    assert distance(held, spike - 1 / spike) < _BAND
    assert distance(same, spike - 1 / spike) > _POWER


def test_lower_end_is_too_small_on_the_same_batch():
    same, held = [], []
    for _ in range(40):
        a, b = (torch.randn(60, 30, dtype=torch.float64) for _ in range(2))
        sample = split_sample(covariance(a), covariance(b), 1, largest=False)
        same.append(sample.same_batch[0])
        held.append(sample.held_out[0])
    assert distance(held, 1.0) < _BAND
    assert distance(same, 1.0) > _POWER
    assert max(same) < 1


def test_fixed_directions_show_no_false_debiasing():
    directions_PK = torch.linalg.qr(torch.randn(20, 3, dtype=torch.float64)).Q
    same, held = [], []
    for _ in range(400):
        a, b = (DenseOperator(covariance(torch.randn(40, 20, dtype=torch.float64))) for _ in range(2))
        estimates = measure_curvature_along(directions_PK, a, b)
        same.append(estimates.same_batch.mean())
        held.append(estimates.held_out.mean())
    assert distance(same, 1.0) < _BAND
    assert distance(held, 1.0) < _BAND
    assert distance([x - y for x, y in zip(same, held, strict=True)], 0.0) < _BAND


class TestFinitePopulation:
    """N = 200 examples, batches of 60: the mean of what is left is too low, the correction is exact."""

    def draw(self):
        generator = torch.Generator().manual_seed(1)
        rows = torch.randn(200, 30, generator=generator, dtype=torch.float64)
        rows[:, 0] *= 1.5
        a, b = torch.randperm(200)[:120].split(60)
        operators = [micro_batched(rows[index], 4) for index in (a, b)]
        sample = split_sample(*operators, 1, population_size=200)
        direction = sample.directions_PK
        return sample, (direction * (covariance(rows) @ direction)).sum()

    def test_correction_is_exact_and_its_absence_is_seen(self):
        drawn = [self.draw() for _ in range(1200)]
        errors = {
            name: [getattr(sample, name)[0] - true for sample, true in drawn]
            for name in ("same_batch", "held_out", "corrected")
        }
        assert distance(errors["corrected"], 0.0) < _BAND
        assert distance(errors["same_batch"], 0.0) > _POWER
        # Uncorrected, the second batch is too low by as much as the first one is too high, times A / (N - A).
        expected = -torch.stack(errors["same_batch"]).mean() * 60 / 140
        assert distance(errors["held_out"], expected) < _BAND
        assert distance(errors["held_out"], 0.0) > _POWER
        # The stated standard error is that of the error, also for sampling without replacement.
        stated = torch.stack([sample.standard_error[0] for sample, _ in drawn]).square().mean().sqrt()
        assert float(stated / torch.stack(errors["corrected"]).std()) == pytest.approx(1, abs=0.06)

    def test_full_batch_needs_no_second(self):
        rows = torch.randn(40, 10, dtype=torch.float64)
        sample = split_sample(micro_batched(rows, 2), micro_batched(rows[:8], 2), 3, population_size=40)
        torch.testing.assert_close(sample.corrected, sample.same_batch, rtol=0, atol=0)
        assert sample.standard_error.tolist() == [0.0, 0.0, 0.0]

    def test_everything_left_leaves_no_error(self):
        rows = torch.randn(40, 10, dtype=torch.float64)
        sample = split_sample(micro_batched(rows[:10], 2), micro_batched(rows[10:], 2), 3, population_size=40)
        exact = (sample.directions_PK * (covariance(rows) @ sample.directions_PK)).sum(0)
        torch.testing.assert_close(sample.corrected, exact)
        assert sample.standard_error.abs().max() == 0

    def test_slope_along_own_gradient(self):
        generator = torch.Generator().manual_seed(2)
        gradients = torch.randn(100, 12, generator=generator, dtype=torch.float64) + 0.2
        mean = gradients.mean(0)
        trace = (gradients - mean).square().sum(1).mean()
        truth = mean.square().sum()
        population = FinitePopulation(100, 25, 25)
        draws = []
        for _ in range(3000):
            a, b = torch.randperm(100)[:50].split(25)
            own = gradients[a].mean(0)
            estimates = measure_slope_along(own[:, None], own, gradients[b], population=population)
            # Given a, the target is the slope of all data along a's gradient.
            draws.append((estimates, own @ mean))
        same = [estimates.same_batch[0] for estimates, _ in draws]
        disjoint = [estimates.held_out[0] for estimates, _ in draws]
        assert distance(same, truth + trace / 25 * 75 / 99) < _BAND
        assert distance(disjoint, truth - trace / 99) < _BAND
        assert distance(same, truth) > _POWER
        assert distance([estimates.corrected[0] - true for estimates, true in draws], 0.0) < _BAND
        assert distance([estimates.corrected[0] for estimates, _ in draws], truth) < _BAND


def test_independent_slopes_are_unbiased():
    mean = torch.full((10,), 0.2, dtype=torch.float64)
    same, held = [], []
    for _ in range(2000):
        a, b = torch.randn(2, 10, dtype=torch.float64) / 3 + mean
        estimates = measure_slope_along(a[:, None], a, b)
        same.append(estimates.same_batch[0])
        held.append(estimates.held_out[0])
    assert distance(held, mean.square().sum()) < _BAND
    assert distance(same, mean.square().sum() + 10 / 9) < _BAND
    assert distance(same, mean.square().sum()) > _POWER


def test_slopes_point_uphill_on_the_first_batch():
    rows = torch.randn(40, 6, dtype=torch.float64)
    gradients = torch.randn(6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    sample = split_sample(covariance(rows[:20]), micro_batched(rows[20:], 4), 6, gradients=gradients)
    assert sample.slope is not None
    assert (sample.slope.same_batch >= 0).all()
    torch.testing.assert_close(sample.slope.held_out, gradients[1].mean(0) @ sample.directions_PK)
    # All directions together give the whole gradient back.
    torch.testing.assert_close(sample.directions_PK @ sample.slope.same_batch, gradients[0])
    assert sample.slope.micro_batches == 4


def test_standard_error_of_unequal_micro_batches_is_unbiased():
    """Micro-batches of 10, 20 and 30 examples: the stated variance of their weighted mean, on average."""
    sizes = torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64)
    weights = (sizes / sizes.sum()).tolist()
    squares = []
    for _ in range(4000):
        values = torch.randn(3, 1, dtype=torch.float64) / sizes.sqrt().unsqueeze(1)
        squares.append(combine_parts(torch.zeros(1), values, weights, None).standard_error.square())
    assert distance(squares, 1 / 60) < _BAND
    # What takes all micro-batches for equal would be caught.
    assert distance(squares, float((1 / sizes).sum() / 9)) > _POWER


def test_intervals_cover_as_often_as_they_say():
    values = torch.randn(3, 4000, dtype=torch.float64)
    estimates = combine_parts(torch.zeros(4000), values, [1 / 3] * 3, None)
    low, high = estimates.interval(0.9)
    covered = float(((low <= 0) & (high >= 0)).double().mean())
    assert covered == pytest.approx(0.9, abs=4 * math.sqrt(0.09 / 4000))


def test_operators_of_other_libraries_are_taken():
    sparse = pytest.importorskip("scipy.sparse")
    linalg = pytest.importorskip("scipy.sparse.linalg")
    a, b = (covariance(torch.randn(30, 6, dtype=torch.float64)) for _ in range(2))
    expected = split_sample(a, b, 3)
    for left, right in (
        (a.numpy(), b.numpy()),
        (linalg.aslinearoperator(a.numpy()), sparse.csr_array(b.numpy())),
    ):
        torch.testing.assert_close(split_sample(left, right, 3).held_out, expected.held_out)


def test_one_micro_batch_has_no_standard_error_and_an_endless_interval():
    sample = split_sample(torch.eye(3), 2 * torch.eye(3), 2)
    assert sample.standard_error.isnan().all()
    low, high = sample.curvature.interval()
    assert low.tolist() == [-math.inf] * 2
    assert high.tolist() == [math.inf] * 2
    with pytest.raises(BatchError, match="2 of 2 variances are not known"):
        sample.inverse()


def test_a_population_that_is_used_up_leaves_a_point():
    rows = torch.randn(40, 6, dtype=torch.float64)
    a, b = (DenseOperator(covariance(part), example_count=20) for part in rows.split(20))
    sample = split_sample(a, b, 2, population_size=40)
    assert sample.curvature.micro_batches == 1
    assert sample.standard_error.tolist() == [0.0, 0.0]
    for end in sample.curvature.interval():
        torch.testing.assert_close(end, sample.corrected, rtol=0, atol=0)


def test_records_survive_json():
    rows = torch.randn(40, 6, dtype=torch.float64)
    sample = split_sample(covariance(rows[:20]), micro_batched(rows[20:], 4), 3)
    again = DirectionalEstimates.from_dict(sample.to_dict()["curvature"])
    torch.testing.assert_close(again.corrected, sample.corrected)
    torch.testing.assert_close(again.standard_error, sample.standard_error)
    lone = split_sample(torch.eye(2), 2 * torch.eye(2), 1)
    assert lone.to_dict()["curvature"]["standard_error"] == [None]
    assert DirectionalEstimates.from_dict(lone.to_dict()["curvature"]).standard_error.isnan().all()


class TestBadInput:
    def test_more_directions_than_parameters(self):
        with pytest.raises(BudgetError, match=r"count=4 directions .* 3 parameters; use count ≤ 3"):
            split_sample(torch.eye(3), 2 * torch.eye(3), 4)

    @pytest.mark.parametrize("count", [0, -1, 1.5, True])
    def test_no_number_of_directions(self, count):
        with pytest.raises(BudgetError, match=f"at least 1, but got {count}"):
            split_sample(torch.eye(3), 2 * torch.eye(3), count)

    def test_the_same_operator_twice(self):
        operator = DenseOperator(torch.eye(3))
        with pytest.raises(OverlapError, match="share 1 of 1 micro-batches"):
            split_sample(operator, operator, 1)

    def test_a_shared_micro_batch(self):
        parts = [DenseOperator(torch.eye(3) * scale) for scale in (1.0, 2.0, 3.0)]
        with pytest.raises(OverlapError, match="share 1 of 2 micro-batches"):
            split_sample(MeanOperator(parts[:2]), MeanOperator(parts[1:]), 1)

    @pytest.mark.parametrize(("start", "shared"), [(10, 2), (16, 1), (20, 0)])
    def test_slices_of_a_data_set_that_overlap(self, start, shared):
        x, y = torch.randn(40, 3), torch.randn(40, 2)
        model, loss = torch.nn.Linear(3, 2), torch.nn.MSELoss()
        a = GaussNewton(model, loss, (x[:20], y[:20]))
        end = start + 8
        b = GaussNewton(model, loss, list(zip(x[start:end].split(4), y[start:end].split(4), strict=True)))
        if not shared:
            assert split_sample(a, b, 1).same_batch > 0
            return
        with pytest.raises(OverlapError, match=f"share {shared} of 2 micro-batches"):
            split_sample(a, b, 1)

    @pytest.mark.parametrize("layout", ["rows", "columns"])
    def test_slices_that_interleave_are_apart(self, layout):
        x = torch.randn(40, 3) if layout == "rows" else torch.randn(3, 40).T
        y, model, loss = torch.randn(40, 2), torch.nn.Linear(3, 2), torch.nn.MSELoss()
        even, odd, third = (
            GaussNewton(model, loss, (x[start::step], y[start::step])) for start, step in ((0, 2), (1, 2), (0, 3))
        )
        halves = [GaussNewton(model, loss, (x[part], y[part])) for part in (slice(0, 20), slice(20, 40))]
        check_independent(even, odd)
        check_independent(*halves)
        for pair in ((even, third), (halves[0], third), (odd, halves[1])):
            with pytest.raises(OverlapError, match="share 1 of 1"):
                check_independent(*pair)

    def test_batches_of_dicts_and_tuples_are_looked_into(self):
        x, z = torch.randn(2, 8, 3)

        class Model(torch.nn.Linear):
            def forward(self, left, right):
                return super().forward(left * right)

        model, reader = Model(3, 1), BatchReader(predict=lambda model, batch: model(*batch["pair"]), size=lambda _: 4.0)
        operators = [
            Hessian(model, lambda output, _: output.square().mean(), {"pair": pair}, reader=reader)
            for pair in ((x[:4], z[:4]), (x[3:7], z[3:7]), (x[4:], z[:4]))
        ]
        with pytest.raises(OverlapError, match="share 1 of 1"):
            check_independent(operators[0], operators[1])
        # What is shared in the last one is no example, but something that goes with all of them.
        check_independent(operators[0], operators[2])

    def test_operators_made_on_the_fly_are_not_mistaken_for_each_other(self):
        for _ in range(20):
            data = torch.randn(2, 6, 3), torch.randn(2, 6, 2)
            model = torch.nn.Linear(3, 2)
            check_independent(*(GaussNewton(model, torch.nn.MSELoss(), pair) for pair in zip(*data, strict=True)))

    def test_shared_examples(self):
        with pytest.raises(OverlapError, match=r"share 6 examples \(4, 5, 6, 7, 8, …\)"):
            check_disjoint(range(10), torch.arange(4, 12))
        with pytest.raises(OverlapError, match="batch b has 3 examples, but only 2 different ones"):
            check_disjoint([1], [2, 2, 3])

    def test_batches_too_large_to_be_disjoint(self):
        with pytest.raises(OverlapError, match="of 60 and 50 examples cannot be disjoint in a population of 100"):
            FinitePopulation(100, 60, 50)

    def test_unknown_number_of_examples(self):
        with pytest.raises(BatchError, match=r"population_size=100 .* operator b does not know"):
            split_sample(DenseOperator(torch.eye(3), example_count=10), 2 * torch.eye(3), 1, population_size=100)

    def test_weights_are_those_of_the_batch(self):
        a = MeanOperator([MicroBatch(DenseOperator(torch.eye(3)), 1.0, 20)])
        sample = split_sample(a, DenseOperator(torch.eye(3), example_count=20), 1, population_size=80)
        assert sample.population == FinitePopulation(80, 20, 20)

    def test_gradients_that_do_not_fit(self):
        gradients = torch.ones(3), torch.ones(2, 3)
        with pytest.raises(ShapeError, match="has 2 rows, but batch b has 1 micro-batches"):
            split_sample(torch.eye(3), 2 * torch.eye(3), 1, gradients=gradients)
        with pytest.raises(ShapeError, match=r"gradient_b must be a vector of 3 parameters .* \(3,\) and \(4,\)"):
            split_sample(torch.eye(3), 2 * torch.eye(3), 1, gradients=(torch.ones(3), torch.ones(4)))

        with pytest.raises(ShapeError, match=r"gradient_a must be a vector of 3 parameters .* \(4,\) and \(3,\)"):
            split_sample(torch.eye(3), 2 * torch.eye(3), 1, gradients=(torch.ones(4), torch.ones(3)))
        with pytest.raises(
            OperandError, match=r"gradient_b is of torch\.float64 on cpu, the directions are of torch\.f"
        ):
            split_sample(torch.eye(3), 2 * torch.eye(3), 1, gradients=(torch.ones(3), torch.ones(3).double()))
        for place, name in enumerate("ab"):
            gradients = [torch.ones(3), torch.ones(3)]
            gradients[place] = torch.tensor([1.0, math.nan, math.inf])
            with pytest.raises(NonFiniteCurvatureError, match=f"2 entries of gradient_{name} are not finite"):
                split_sample(torch.eye(3), 2 * torch.eye(3), 1, gradients=tuple(gradients))

    def test_inverses_that_do_not_exist(self):
        parts = MeanOperator([DenseOperator(torch.zeros(2, 2)) for _ in range(2)])
        sample = split_sample(torch.eye(2), parts, 1)
        with pytest.raises(SingularCurvatureError, match="1 of 1 estimates are 0 without any uncertainty"):
            sample.inverse()
        assert sample.inverse(0.5).tolist() == [2.0]
        with pytest.raises(BudgetError, match=r"damping must be a number of at least 0, but got -0\.5"):
            sample.inverse(-0.5)

    def test_directions_that_do_not_fit(self):
        operator = DenseOperator(torch.eye(3))
        with pytest.raises(ShapeError, match=r"columns \[3, K\], but got the shape \(3,\)"):
            measure_curvature_along(torch.ones(3), operator, DenseOperator(torch.eye(3)))
        with pytest.raises(NonFiniteCurvatureError, match="1 entries of the directions"):
            measure_curvature_along(torch.tensor([[1.0], [math.nan], [0.0]]), operator, operator)

    def test_level(self):
        with pytest.raises(BudgetError, match=r"level must be in \(0, 1\), but got 95"):
            split_sample(torch.eye(3), 2 * torch.eye(3), 1).curvature.interval(95)
