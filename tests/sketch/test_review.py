"""Corners that a review found: half precision, empty samples, scores out of place, fields that do not exist."""

import pytest
import torch
from torch import nn

from cheapgrad import Rule, approximate
from cheapgrad.errors import PlacementError, UnknownNameError
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
