"""Stochastic rounding: every up-and-down pattern of a small matrix, scales that cover, packing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from cheapgrad.errors import BudgetError, PlacementError
from cheapgrad.sketch import DenseMatrix, Moment, Operands, StochasticRounding
from cheapgrad.sketch.bits import pack_bits, unpack_bits
from tests.oracles import rounding as oracle
from tests.sketch.enumeration import feed

LAST_DITHER = 1 - 2.0**-24


def _store(codec, matrix):
    return codec.store(Operands(Moment.STORED, DenseMatrix(matrix)))


def _decode(codec, matrix):
    return codec.restore(_store(codec, matrix), *matrix.shape, matrix.dtype).dense()


def _matrix(rows, columns, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 3 + 1).to(dtype)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_pattern_of_a_small_matrix(bits, monkeypatch):
    codec, matrix_NI = StochasticRounding(bits=bits, group=8), _matrix(2, 4)
    cotangent_NO = _matrix(2, 3, seed=1)
    scales = _store(codec, matrix_NI)[1].double().numpy()
    below, above, up = oracle.lower_upper_chance(matrix_NI.numpy().ravel(), scales[0, 0], scales[0, 1])
    total, mean, squared_error = 0.0, np.zeros((3, 4)), 0.0
    truth = cotangent_NO.numpy().T @ matrix_NI.numpy()
    for pattern in itertools.product((0, 1), repeat=8):
        feed(monkeypatch, np.array(pattern) * LAST_DITHER)
        decoded = _decode(codec, matrix_NI)
        rounded_up = np.array(pattern) * (up > 0)
        np.testing.assert_allclose(decoded.numpy().ravel(), np.where(rounded_up, above, below), rtol=1e-13, atol=1e-14)
        chance = np.prod(np.where(pattern, up, 1 - up))
        estimate = cotangent_NO.numpy().T @ decoded.numpy()
        total += chance
        mean += chance * estimate
        squared_error += chance * ((estimate - truth) ** 2).sum()
    assert total == pytest.approx(1, rel=1e-12)
    np.testing.assert_allclose(mean, truth, rtol=1e-12, atol=1e-13)
    stated = codec.law.variance(matrix_NI, cotangent_NO)
    assert float(stated.weight) == pytest.approx(squared_error, rel=1e-11)
    assert float(stated.input) == 0


def test_an_entry_goes_up_exactly_when_the_dither_passes_its_fraction(monkeypatch):
    codec, matrix = StochasticRounding(bits=4, group=8), _matrix(1, 8)
    scales = _store(codec, matrix)[1].double().numpy()
    below, above, up = oracle.lower_upper_chance(matrix.numpy().ravel(), scales[0, 0], scales[0, 1])
    assert ((up > 0.01) & (up < 0.99)).sum() >= 5
    feed(monkeypatch, np.clip(1 - up - 1e-6, 0, LAST_DITHER))
    np.testing.assert_allclose(_decode(codec, matrix).numpy().ravel(), below, rtol=1e-12, atol=1e-13)
    feed(monkeypatch, np.clip(1 - up + 1e-6, 0, LAST_DITHER))
    inner = up > 1e-5
    np.testing.assert_allclose(_decode(codec, matrix).numpy().ravel()[inner], above[inner], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dither", [0.0, LAST_DITHER])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 300.0, -300.0])
def test_the_scales_cover_every_group_so_that_no_entry_moves_by_more_than_a_step(
    dither, bits, dtype, offset, monkeypatch
):
    codec, matrix = StochasticRounding(bits=bits), _matrix(7, 13, dtype) + torch.tensor(offset, dtype=dtype)
    feed(monkeypatch, np.full((2, 64), dither))
    kept = _store(codec, matrix)
    low, step = kept[1].double().T
    groups = torch.nn.functional.pad(matrix.flatten().double(), (0, 128 - 91), value=float(matrix[-1, -1])).view(2, 64)
    assert (low <= groups.amin(1)).all()
    assert (low + (2**bits - 1) * step >= groups.amax(1)).all()
    error = (codec.restore(kept, 7, 13, torch.float64).dense() - matrix.double()).abs()
    assert (error <= step.max() * (1 + 1e-3)).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_constant_group_has_no_error_beyond_the_rounding_of_its_scale(bits):
    matrix = torch.full((4, 16), 1.5, dtype=torch.float64)
    assert torch.equal(_decode(StochasticRounding(bits=bits), matrix), matrix)
    assert torch.equal(_decode(StochasticRounding(bits=bits), torch.zeros(4, 16)), torch.zeros(4, 16))


def test_a_far_constant_is_unbiased_too():
    # 1.001 is no bfloat16 number: the lowest value lies below it and the steps have to make up for the difference.
    matrix = torch.full((400, 64), 1.001, dtype=torch.float64)
    decoded = _decode(StochasticRounding(bits=2), matrix)
    assert float(decoded.std()) > 1e-6
    standard_error = float(decoded.std()) / decoded.numel() ** 0.5
    assert abs(float(decoded.mean()) - 1.001) < 5 * standard_error


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("length", [1, 3, 8, 64, 77])
def test_packing_round_trip(bits, length):
    codes = torch.randint(0, 2**bits, (length,), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (-(-length * bits // 8),)
    assert torch.equal(unpack_bits(packed, bits, length), codes)


def test_rows_are_those_of_the_dense_matrix():
    for inputs in (64, 24):
        codec, matrix = StochasticRounding(bits=4), _matrix(5, inputs)
        stored = codec.restore(_store(codec, matrix), 5, inputs, matrix.dtype)
        index = torch.tensor([3, 0, 3])
        torch.testing.assert_close(stored.rows(index), stored.dense()[index], rtol=0, atol=0)


@pytest.mark.parametrize("bits", [1, 3, 16, 0, -2, True, 4.5])
def test_bits_out_of_range(bits):
    with pytest.raises(BudgetError, match=f"bits must be 2, 4 or 8, but got {bits!r}"):
        StochasticRounding(bits=bits)


@pytest.mark.parametrize(("group", "message"), [(4, "at least 8, but got 4"), (12, "multiple of 8, but got 12")])
def test_group_out_of_range(group, message):
    with pytest.raises(BudgetError, match=f"group must be a .*{message}"):
        StochasticRounding(bits=4, group=group)


def test_it_has_no_meaning_for_a_cotangent():
    with pytest.raises(PlacementError, match=r"StochasticRounding\(bits=4\) has no meaning in cotangent=.*in stored="):
        StochasticRounding(bits=4).check_placement(Moment.COTANGENT)
