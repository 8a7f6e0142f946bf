"""The controller: its estimate against measured noise, its law against closed forms, its state, its errors."""

from __future__ import annotations

import copy
import functools
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import cheapgrad
from cheapgrad.auditing import measure_gradient_moments
from cheapgrad.errors import BudgetError, ControlError, ControlWarning, ConversionError, NoMatchError, PlacementError
from cheapgrad.planning.controller import Controller
from cheapgrad.planning.controller_curve import KEEPS, draw_curve, relative_variance
from cheapgrad.planning.controller_law import NoiseSchedule, find_shift, round_keep, shift_keep
from cheapgrad.planning.controller_trial import Trial, TrialDesign
from cheapgrad.sketch import ColumnSample, Poisson, RowSample, Systematic, minimum_variance
from tests.planning.controlled import (
    B,
    D,
    Tokens,
    list_weights,
    make_batch,
    mean_loss,
    measure_between_trials,
    measure_noise,
    run_step,
    set_up,
    shares_of,
    weight_gradient,
)


@pytest.mark.parametrize(
    ("target", "micro_batches"),
    [(0.05, (B,)), (0.2, (B,)), (0.3, (B, B, B // 2))],
    ids=["low", "high", "accumulated"],
)
def test_noise_is_kept_at_the_target(target: float, micro_batches: tuple[int, ...]) -> None:
    model, handle, controller = set_up(keep=0.25, noise=target, every=2)
    generator = torch.Generator().manual_seed(1)
    noises, keeps = [], {}
    # What training uses is the accumulated gradient: its noise is measured, less often, as it takes more passes.
    period, batches, draws = (20, 60, 3) if len(micro_batches) == 1 else (40, 30, 2)

    def measure() -> float:
        return measure_noise(model, handle, micro_batches, batches=batches, draws=draws)

    # Over a stretch of training, as the page defines it: each moment's budgets are estimates.
    for step in range(1, 122):
        parts = [make_batch(generator, examples) for examples in micro_batches]
        for share, part in zip(shares_of(parts), parts, strict=True):
            (share * mean_loss(model, part)).backward()
        controller.step()
        if step % period == 1 and step > 40:
            keeps = controller.keeps
            noises.append(measure_between_trials(handle, keeps, measure))
    assert sum(noises) / len(noises) == pytest.approx(target, rel=0.2)
    # The start, keep .25, is far off: a controller that does nothing fails.
    start = measure_between_trials(handle, dict.fromkeys(keeps, 0.25), measure)
    assert abs(start / target - 1) > 0.4


def test_trials_leave_the_gradient_unbiased() -> None:
    model, handle, _ = set_up()
    batch, weights = make_batch(torch.Generator().manual_seed(5)), list_weights(model)
    with handle.exact():
        exact = weight_gradient(model, batch, weights)
    seeds = iter(range(10_000))

    def draw() -> list[Tensor]:
        trial = Trial(next(seeds), lambda: B)
        handle.replace_strategies(
            {name: RowSample(0.3, design=TrialDesign(Systematic(), trial, name, 0.5)) for name in handle.strategies()}
        )
        return weight_gradient(model, batch, weights)

    moments = measure_gradient_moments(draw, exact, draws=256)
    assert moments.unbiased
    assert moments.detectable_relative_bias < 0.2
    halved = measure_gradient_moments(lambda: [0.8 * part for part in draw()], exact, draws=256)
    assert not halved.unbiased


def test_a_curve_is_the_least_variance_at_every_budget() -> None:
    # A hundred fractions of 200 rows are whole numbers, as the oracle needs them.
    scores = torch.rand(200, generator=torch.Generator().manual_seed(2), dtype=torch.float64) ** 4
    scores[:20] = 0
    *curve, squared_norm = draw_curve(scores)
    expected = [minimum_variance(scores, round(keep * 200)) for keep in KEEPS]
    torch.testing.assert_close(torch.stack(curve), torch.stack(expected), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(squared_norm, scores.square().sum())


def test_whole_numbers_of_rows_take_turns_so_that_noise_is_right_on_average() -> None:
    kept = [round(64 * round_keep(0.7361, 64, step, 2)) for step in range(2000)]
    assert set(kept) == {47, 48}
    assert sum(kept) / 2000 == pytest.approx(0.7361 * 64, abs=0.01)
    assert round_keep(0.7361, None, 3, 2) == 0.7361
    assert round_keep(0.001, 64, 3, 2) == 1 / 64


@pytest.mark.parametrize("keep", [0.95, 0.5, 0.31, 0.07])
def test_between_known_budgets_equal_scores_are_interpolated_exactly(keep: float) -> None:
    variances = torch.tensor([1 / known - 1 for known in KEEPS], dtype=torch.float64)
    curve = torch.cat([7 * variances, torch.tensor([7.0], dtype=torch.float64)])
    assert relative_variance(curve, keep) == pytest.approx(1 / keep - 1)
    shift = find_shift({"a": curve}, {"a": 0.5}, {"a": 2.0}, 2 * (1 / keep - 1), 0.01)
    assert shift_keep(0.5, shift, 0.01) == pytest.approx(keep, rel=1e-6)


def test_resuming_goes_on_bit_for_bit() -> None:
    def train(model: nn.Module, controller: Controller, steps: int, generator: torch.Generator) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(steps):
            optimizer.zero_grad()
            mean_loss(model, make_batch(generator)).backward()
            optimizer.step()
            controller.step()

    model, _, controller = set_up(noise=0.1, every=3)
    generator = torch.Generator().manual_seed(4)
    train(model, controller, 37, generator)
    saved = copy.deepcopy((model.state_dict(), controller.state_dict()))
    states = torch.random.get_rng_state(), generator.get_state()
    train(model, controller, 20, generator)
    resumed, _, again = set_up(noise=0.1, every=3)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    torch.random.set_rng_state(states[0])
    generator.set_state(states[1])
    train(resumed, again, 20, generator)
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert again.keeps == controller.keeps
    assert again.history == controller.history


def test_passes_of_accumulated_micro_batches_add_up() -> None:
    model, _, controller = set_up(noise=0.1)
    generator = torch.Generator().manual_seed(6)
    for _ in range(3):
        mean_loss(model, make_batch(generator)).backward()
    controller.step()
    assert controller.state_dict()["totals"][0] == 3


def test_strategies_to_go_on_with_have_the_designs_that_were_converted() -> None:
    torch.manual_seed(3)
    model = Tokens().double()
    rule = cheapgrad.Rule(cotangent=RowSample(0.5, design=Poisson()))
    handle = cheapgrad.approximate(model, rule, skip_small=False)
    controller = Controller(handle, noise=0.1)
    for _ in range(4):
        run_step(model, controller, torch.Generator().manual_seed(2))
    assert controller.strategies == {name: RowSample(keep, design=Poisson()) for name, keep in controller.keeps.items()}
    handle.replace_strategies(controller.strategies)


def test_a_calibration_at_its_limit_is_said() -> None:
    _, _, controller = set_up(noise=0.1)
    state = controller.state_dict()
    state["totals"][1] = 20 * state["totals"][2]
    controller.load_state_dict(state)
    assert controller.calibration == 8
    assert (
        controller._say_limit()
        == "noise grows 20 times on its way down, and 8 is used: it may be larger than estimated"
    )


def test_a_schedule_moves_from_cheap_to_careful() -> None:
    model, _, controller = set_up(noise=NoiseSchedule(first=0.4, last=0.02, steps=40), every=2)  # type: ignore[arg-type]
    generator, keeps = torch.Generator().manual_seed(7), []
    for _ in range(60):
        run_step(model, controller, generator)
        keeps.append(controller.keep)
    assert controller.target == 0.02
    assert keeps[8] < keeps[-1] - 0.1
    assert controller.noise == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("noise", [0.0, -1, math.inf, math.nan, "5%", True])
def test_targets_out_of_range_are_refused(noise: object) -> None:
    with pytest.raises(ControlError, match="noise must be a finite number above 0"):
        set_up(noise=noise)
    with pytest.raises(ControlError, match="last must be"):
        NoiseSchedule(0.1, noise, 10)  # type: ignore[arg-type]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(BudgetError, match="every must be a whole number of at least 1, but got 0"):
        set_up(every=0)
    with pytest.raises(BudgetError, match="least_keep"):
        set_up(least_keep=2.0)
    with pytest.raises(ControlError, match="steps must be a whole number of at least 1, but got 0"):
        NoiseSchedule(0.1, 0.1, 0)
    columns = nn.Sequential(nn.Linear(8, 8))
    handle = cheapgrad.approximate(columns, cheapgrad.Rule(cotangent=ColumnSample(0.5)), skip_small=False)
    with pytest.raises(ControlError, match="no converted layer samples rows"):
        Controller(handle)


def test_trials_that_show_nothing_are_an_error() -> None:
    model, _, controller = set_up()
    controller.step()
    controller.step()
    with pytest.raises(ControlError, match="3 trials in a row measured nothing: no backward pass"):
        controller.step()
    model, _, controller = set_up()
    generator = torch.Generator().manual_seed(8)
    for _ in range(2):
        run_step(model, controller, generator, examples=3)
    with pytest.raises(ControlError, match="of 3 examples"):
        run_step(model, controller, generator, examples=3)


def test_noise_that_is_drawn_at_a_frozen_layer_alone_is_an_error_and_not_zero() -> None:
    model, _, controller = set_up(noise=0.1)
    assert isinstance(model.head, nn.Linear)
    model.head.weight.requires_grad_(False)
    generator = torch.Generator().manual_seed(9)
    run_step(model, controller, generator)
    assert controller.noise is None
    assert controller.obstacle == "the rows drawn at head are in the gradient of no linear weight that is trained there"
    run_step(model, controller, generator)
    with pytest.raises(ControlError, match="3 trials in a row measured nothing: the rows drawn at head are in"):
        run_step(model, controller, generator)


def test_noise_of_a_frozen_layer_is_seen_below_where_rows_are_drawn_again() -> None:
    torch.manual_seed(3)
    model = Tokens().double()
    model.head.weight.requires_grad_(False)
    rules = [cheapgrad.Rule(name, cotangent=RowSample(keep)) for name, keep in (("head", 0.95), ("blocks*", 0.2))]
    handle = cheapgrad.approximate(model, rules, skip_small=False)
    controller = Controller(handle, noise=0.1, every=2)
    generator, noises = torch.Generator().manual_seed(9), []
    below = [weight for weight in list_weights(model) if weight.requires_grad]
    for step in range(1, 162):
        run_step(model, controller, generator)
        if step % 40 == 1 and step > 40:
            measure = functools.partial(measure_noise, model, handle, batches=40, draws=2, weights=below)
            noises.append(measure_between_trials(handle, controller.keeps, measure))
    assert sum(noises) / len(noises) == pytest.approx(0.1, rel=0.25)


def test_states_of_other_models_are_refused() -> None:
    _, _, controller = set_up(keep=0.5)
    _, _, other = set_up(keep=0.25)
    with pytest.raises(ControlError, match=r"'blocks.0.1': 0.25"):
        controller.load_state_dict(other.state_dict())
    with pytest.raises(ControlError, match="curves, factors, followers, history"):
        controller.load_state_dict({"step": 1})


def test_no_handle_and_a_reverted_one_are_named() -> None:
    model, handle, controller = set_up()
    with pytest.raises(ControlError, match="but got Tokens"):
        Controller(model)  # type: ignore[arg-type]
    run_step(model, controller, torch.Generator().manual_seed(0))
    handle.revert()
    with pytest.raises(ConversionError, match="revert"):
        controller.step()


def test_replaced_strategies_must_fit_the_layer() -> None:
    _, handle, _ = set_up()
    with pytest.raises(NoMatchError, match="did you mean 'head'"):
        handle.replace_strategies({"heads": RowSample(0.5)})
    with pytest.raises(PlacementError, match="cannot stand in for"):
        handle.replace_strategies({"head": ColumnSample(0.5)})
    handle.replace_strategies({"head": RowSample(0.125)})
    assert handle.strategies()["head"] == RowSample(0.125)
    assert next(row for row in handle.rows if row.name == "head").cotangent == "RowSample(keep=0.125)"


def test_second_controller_takes_over() -> None:
    model, handle, first = set_up(keep=0.5, noise=0.2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        mean_loss(model, make_batch(generator)).backward()
        first.step()
    assert first.keep != pytest.approx(0.5, abs=1e-3), "else there is nothing to put back"
    second = Controller(handle, noise=0.2)
    second.load_state_dict(first.state_dict())
    assert second.keeps == first.keeps
    fresh = Controller(handle, noise=0.2)
    assert fresh.keeps == dict.fromkeys(fresh.keeps, 0.5)
    assert not any(isinstance(value.design, TrialDesign) for value in fresh._base.values())
    for relieved in (first, second):
        with pytest.raises(ControlError, match="another controller"):
            relieved.step()
    mean_loss(model, make_batch(generator)).backward()
    fresh.step()
    assert fresh.history, "its trial is that of the pass"


def test_controller_refused_for_its_arguments_takes_nothing_over() -> None:
    model, handle, controller = set_up()
    with pytest.raises(BudgetError):
        Controller(handle, least_keep=0.0)
    mean_loss(model, make_batch(torch.Generator().manual_seed(0))).backward()
    controller.step()
    assert controller.history


def test_batch_norm_is_said() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.ReLU(), nn.Linear(D, D))
    handle = cheapgrad.approximate(model, cheapgrad.Rule("*", cotangent=RowSample(0.5)), skip_small=False)
    with pytest.warns(ControlWarning, match="'1' normalise"):
        Controller(handle)
    model[1].eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Controller(handle)
