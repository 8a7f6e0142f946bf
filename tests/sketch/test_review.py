"""Corners that a review found: half precision, empty samples, scores out of place, fields that do not exist."""

import pytest
import torch
from torch import nn

from cheapgrad import Rule, approximate
from cheapgrad.cost import measure_held_bytes
from cheapgrad.errors import ForwardResultError, PlacementError, RuleError, UnknownNameError
from cheapgrad.sketch import (
    DenseMatrix,
    Moment,
    Operands,
    Poisson,
    PredictedNorm,
    RowSample,
    StochasticRounding,
    from_dict,
)
from cheapgrad.testing import check_law


def decoded_mean(matrix, draws):
    codec = StochasticRounding(4)
    total = torch.zeros(matrix.shape, dtype=torch.float64)
    for _ in range(draws):
        kept = codec.store(Operands(Moment.STORED, DenseMatrix(matrix)))
        total += codec.restore(kept, *matrix.shape, matrix.dtype).dense().double()
    return total / draws


def test_a_codec_of_large_float16_numbers_stays_finite():
    torch.manual_seed(0)
    matrix = -65504 + 500 * torch.rand(4, 64)
    mean = decoded_mean(matrix.half(), 20)
    assert mean.isfinite().all()
    assert (mean - matrix.half().double()).abs().max() < 300


def test_a_codec_of_tiny_float16_numbers_is_unbiased():
    torch.manual_seed(0)
    matrix = (1e-5 * torch.randn(64, 64)).half()
    draws = 2000
    error = decoded_mean(matrix, draws) - matrix.double()
    # Rounding the decoded value to float16 is worth half a subnormal, 2**-25, in each entry, and nothing on average.
    step = (matrix.double().amax() - matrix.double().amin()) / 15
    assert error.mean().abs() < 5 * (step / draws**0.5 / matrix.numel() ** 0.5 + 2.0**-25 / matrix.numel() ** 0.5)


def test_an_empty_sample_hides_no_nan():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    approximate(layer, Rule(cotangent=RowSample(0.1, design=Poisson())), skip_small=False)
    x = torch.randn(10, 4)
    x[0, 0] = torch.nan
    for _ in range(60):
        (gradient,) = torch.autograd.grad(layer(x), layer.weight, torch.randn(10, 4))
        assert gradient.isnan().any()


def test_predictions_of_the_cotangent_have_no_place_beside_it():
    with pytest.raises(PlacementError, match=r"PredictedNorm\(\) has no meaning in cotangent="):
        Rule(cotangent=RowSample(0.5, scores=PredictedNorm()))


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(UnknownNameError, match="RowSample has no field 'kep'; did you mean 'keep'"):
        from_dict({"type": "RowSample", "kep": 0.2})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"strategy": "x"}, "strategy must be a strategy such as .* but got 'x'"),
        ({"strategy": RowSample}, "strategy must be a strategy such as .* but got <class"),
        ({"strategy": RowSample(0.5), "moment": "cotangent"}, "moment must be Moment.STORED .* but got 'cotangent'"),
    ],
)
def test_the_law_checker_names_what_is_no_strategy_and_no_moment(arguments, text):
    with pytest.raises(PlacementError, match=text):
        check_law(arguments.pop("strategy"), **arguments)


def test_too_few_draws_are_inconclusive_and_not_a_broken_law():
    report = check_law(RowSample(0.2), draws=100)
    assert not report.ok
    assert "INCONCLUSIVE" in str(report)


def test_rules_say_how_to_pass_a_module():
    layer = nn.Linear(4, 4)
    with pytest.raises(RuleError, match=r"pattern is a module \(Linear\), not a description of one"):
        Rule(layer, stored=StochasticRounding(4))


def test_a_number_holds_no_graph():
    with pytest.raises(ForwardResultError, match=r"returned the number 1\.0, which holds no graph"):
        measure_held_bytes(lambda: 1.0)
