"""Stochastic rounding: every outcome of the shared dithers of a small matrix, scales that cover, packing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from cheapgrad.errors import BudgetError, PlacementError
from cheapgrad.sketch import DenseMatrix, Moment, Operands, StochasticRounding, fusing
from cheapgrad.sketch._codes import encode_groups
from cheapgrad.sketch.bits import pack_bits, unpack_bits
from cheapgrad.sketch.dither import draw_dither, van_der_corput
from cheapgrad.sketch.stochastic_rounding import as_groups, rounding_steps
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


def _grid_points(codec, matrix):
    """Return the values below and above every entry and the chance of the upper one, in the matrix's shape."""
    low, step = (
        column.repeat_interleave(codec.group)[: matrix.numel()].view(matrix.shape).numpy()
        for column in _store(codec, matrix)[1].double().T
    )
    return oracle.lower_upper_chance(matrix.double().numpy(), low, step)


def _draws_of(codec, matrix):
    """Return for every entry which draw it shares, and its shift: the definition, in plain Python."""
    rows, columns = matrix.shape
    flat = np.arange(rows * columns)
    if columns >= codec.group:
        draw, place, count = flat // codec.group, flat % codec.group, codec.group
    else:
        draw, place, count = flat // columns, flat % columns, columns
    return draw.reshape(rows, columns), np.array(oracle.mirrored_digits(count))[place].reshape(rows, columns)


CASES = [
    (2, (2, 8), 8),
    (4, (2, 8), 8),
    (8, (2, 8), 8),
    (4, (3, 4), 8),
    (2, (3, 3), 8),
    (4, (2, 12), 8),
    (4, (1, 24), 16),
]


@pytest.mark.parametrize(("bits", "shape", "group"), CASES)
def test_every_outcome_of_a_small_matrix(bits, shape, group, monkeypatch):
    codec, matrix_NI = StochasticRounding(bits=bits, group=group), _matrix(*shape)
    cotangent_NO = _matrix(shape[0], 3, seed=1)
    below, above, up = _grid_points(codec, matrix_NI)
    draw, shift = _draws_of(codec, matrix_NI)
    outcomes = [oracle.outcomes_of_a_draw(up[draw == one], shift[draw == one]) for one in range(draw.max() + 1)]
    total, mean, squared_error = 0.0, 0.0, 0.0
    truth = cotangent_NO.numpy().T @ matrix_NI.numpy()
    for outcome in itertools.product(*outcomes):
        feed(monkeypatch, np.array([dither for dither, _, _ in outcome]))
        decoded = _decode(codec, matrix_NI).numpy()
        is_up = np.zeros(shape, dtype=bool)
        for one, (_, _, ups) in enumerate(outcome):
            is_up[draw == one] = ups
        np.testing.assert_allclose(decoded, np.where(is_up, above, below), rtol=1e-12, atol=1e-13)
        chance = np.prod([length for _, length, _ in outcome])
        estimate = cotangent_NO.numpy().T @ decoded
        total += chance
        mean += chance * estimate
        squared_error += chance * ((estimate - truth) ** 2).sum()
    assert total == pytest.approx(1, rel=1e-12)
    np.testing.assert_allclose(mean, truth, rtol=1e-12, atol=1e-13)
    stated = codec.law.variance(matrix_NI, cotangent_NO)
    assert float(stated.weight) == pytest.approx(squared_error, rel=1e-11)
    assert float(stated.input) == 0


@pytest.mark.parametrize("shape", [(6, 64), (6, 96), (40, 10), (40, 3), (7, 63)])
def test_no_two_rows_share_a_draw_within_a_column(shape):
    """Dithers that share a draw keep their distance on the circle from one drawing to the next."""
    rows, columns = shape

    def dithers():
        drawn = draw_dither(torch.zeros(()), rows, columns, 64).entries()
        return drawn.flatten()[: rows * columns].view(rows, columns)

    torch.manual_seed(0)
    first, second = ((dither[:, None] - dither[None]) % 1 for dither in (dithers(), dithers()))
    distance = (first - second).abs()
    distance = torch.minimum(distance, 1 - distance)
    assert (distance.diagonal() == 0).all()
    distance.diagonal(dim1=0, dim2=1).fill_(1)
    assert distance.min() > 1e-6
    one_row = dithers()[0]
    assert one_row.unique().numel() == columns or columns > 64


def test_a_sum_over_the_features_of_a_row_of_equal_entries_is_far_surer_than_with_draws_of_their_own():
    codec, matrix = StochasticRounding(bits=2), torch.full((2000, 64), 1.4, dtype=torch.float64)
    matrix[:, 0], matrix[:, 1] = 0, 3
    error = _decode(codec, matrix) - matrix
    independent = 64 * error.square().mean()
    assert error.sum(1).square().mean() < independent / 16


def test_van_der_corput_spreads_every_aligned_run():
    shifts = np.array(van_der_corput(64))
    np.testing.assert_array_equal(shifts, oracle.mirrored_digits(64))
    for run in (2, 4, 8, 16, 32, 64):
        for start in range(0, 64, run):
            part = np.sort(shifts[start : start + run])
            np.testing.assert_allclose(np.diff(np.append(part, part[0] + 1)), 1 / run)
    assert all(0 <= shift < 1 for count in (1, 3, 24, 1000) for shift in van_der_corput(count))


@pytest.mark.parametrize("dither", [0.0, LAST_DITHER])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 300.0, -300.0])
@pytest.mark.parametrize("shape", [(7, 13), (1, 91)])
def test_the_scales_cover_every_group_so_that_no_entry_moves_by_more_than_a_step(
    dither, bits, dtype, offset, shape, monkeypatch
):
    codec, matrix = StochasticRounding(bits=bits), _matrix(*shape, dtype) + torch.tensor(offset, dtype=dtype)
    feed(monkeypatch, np.full(7 if shape == (7, 13) else 2, dither))
    kept = _store(codec, matrix)
    low, step = kept[1].double().T
    groups = torch.nn.functional.pad(matrix.flatten().double(), (0, 128 - 91), value=float(matrix[-1, -1])).view(2, 64)
    assert (low <= groups.amin(1)).all()
    assert (low + (2**bits - 1) * step >= groups.amax(1)).all()
    error = (codec.restore(kept, *shape, torch.float64).dense() - matrix.double()).abs()
    assert (error <= step.max() * (1 + 1e-3)).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_largest_entry_never_passes_the_last_code(bits, monkeypatch):
    """Spans whose step is a bfloat16 number leave no slack but the margin; a code too many would wrap to the lowest."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(128, 256, (5000, 1), generator=generator) * 2.0 ** torch.randint(-9, 9, (5000, 1))
    matrix = torch.rand(5000, 8, generator=generator) * steps
    matrix[:, 0], matrix[:, 1:] = 0, (2**bits - 1) * steps
    codec = StochasticRounding(bits=bits, group=8)
    feed(monkeypatch, np.full(5000, LAST_DITHER))
    assert ((_decode(codec, matrix) - matrix).abs() <= steps * 1.02).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_constant_group_has_no_error_beyond_the_rounding_of_its_scale(bits):
    matrix = torch.full((4, 16), 1.5, dtype=torch.float64)
    assert torch.equal(_decode(StochasticRounding(bits=bits), matrix), matrix)
    assert torch.equal(_decode(StochasticRounding(bits=bits), torch.zeros(4, 16)), torch.zeros(4, 16))


def test_a_far_constant_is_unbiased_too():
    # 1.001 is no bfloat16 number: the lowest value lies below it and the steps have to make up for the difference.
    matrix = torch.full((10_000, 8), 1.001, dtype=torch.float64)
    decoded = _decode(StochasticRounding(bits=2), matrix)
    row_means = decoded.mean(1)
    assert float(decoded.std()) > 1e-6
    standard_error = float(row_means.std()) / row_means.numel() ** 0.5
    assert abs(float(row_means.mean()) - 1.001) < 5 * standard_error


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_not_finite_shows_in_its_group_and_nowhere_else(value, bits):
    matrix = _matrix(3, 128, torch.float32)
    matrix[1, 70] = value
    torch.manual_seed(0)
    decoded = _decode(StochasticRounding(bits=bits), matrix)
    assert not decoded[1, 70].isfinite()
    matrix[1, 70] = 0
    torch.manual_seed(0)
    clean = _decode(StochasticRounding(bits=bits), matrix)
    decoded[1, 64:], clean[1, 64:] = 0, 0
    assert torch.equal(decoded, clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_beyond_the_largest_single_nothing_decodes_to_a_wrong_number(bits, dtype):
    """Both neighbours on the grid, by the lowest and the highest dither, are a step from the entry or not finite."""
    spread = torch.linspace(0, 1, 64, dtype=torch.float64)
    edges = [(0.0, 3.3e38), (-3.3e38, 0.0), (-1.6e38, 1.6e38), (-2e38, 2e38), (0.0, 3.4e38), (-3.4e38, 0.0)]
    matrix = torch.stack([low + (high - low) * spread for low, high in edges]).to(dtype)
    step = rounding_steps(matrix, StochasticRounding(bits))[0].double()
    for decoded in _neighbours(StochasticRounding(bits), matrix):
        assert decoded[:3].isfinite().all()
        if dtype is torch.float32:
            assert not decoded[3].isfinite().any(), "the span is no single number"
        error = (decoded.double() - matrix.double()).abs()
        assert (~decoded.isfinite() | (error <= step * (1 + 1e-5))).all()


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_half_precision_adds_the_rounding_of_decoded_values(dtype, unit, bits):
    """The exact mean over both neighbours is off by half a unit in the last place of the larger one, and no more."""
    codec, matrix = StochasticRounding(bits), (_matrix(64, 64) * 3 + 1).to(dtype)
    low, high = (decoded.double() for decoded in _neighbours(codec, matrix))
    _, up = rounding_steps(matrix.double(), codec)
    bias = (1 - up) * low + up * high - matrix.double()
    allowed = unit * torch.maximum(low.abs(), high.abs())
    assert (bias.abs() <= allowed + 1e-6).all()
    # A float16 holds codes of few bits times a bfloat16 number exactly.
    if dtype is torch.bfloat16 or bits == 8:
        assert (bias.abs() > allowed / 8).any()


def test_the_largest_half_precision_number_is_a_wall():
    matrix = torch.linspace(0, 65504, 64).half().unsqueeze(0)
    codec = StochasticRounding(bits=2)
    low, high = (decoded.double() for decoded in _neighbours(codec, matrix))
    step, up = rounding_steps(matrix.double(), codec)
    bias = ((1 - up) * low + up * high - matrix.double()) / step
    beyond = matrix.double() > 2 * step
    assert high.max() == 65504
    assert (bias[~beyond].abs() < 2e-3).all()
    assert ((bias[beyond] > -1) & (bias[beyond] < 2e-3)).all()


@pytest.mark.parametrize("shape", [(9, 128), (50, 24), (11, 100), (3, 1)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_working_in_pieces_changes_nothing(shape, bits, monkeypatch):
    codec, matrix = StochasticRounding(bits=bits), _matrix(*shape, torch.float32)
    torch.manual_seed(0)
    whole = _store(codec, matrix)
    monkeypatch.setattr(fusing, "_PIECE", 200)
    torch.manual_seed(0)
    for ours, expected in zip(_store(codec, matrix), whole, strict=True):
        assert torch.equal(ours, expected)


def _neighbours(codec, matrix):
    """Return what every entry decodes to when rounded down and when rounded up."""
    groups = as_groups(matrix, codec.group)
    decoded = []
    for dither in (0.0, 1 - 2.0**-24):
        kept = encode_groups(groups, torch.full((groups.shape[0], 1), dither), torch.zeros(1), bits=codec.bits)
        decoded.append(codec.restore(kept, *matrix.shape, matrix.dtype).dense())
    return decoded


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(1,), (3,), (8,), (77,), (5, 64), (3, 2, 13)])
def test_packing_round_trip(bits, shape):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (*shape[:-1], -(-shape[-1] * bits // 8))
    assert torch.equal(unpack_bits(packed, bits, shape[-1]), codes)
    garbage = codes | (0xFF & ~(2**bits - 1))
    assert torch.equal(pack_bits(garbage, bits), packed)


@pytest.mark.parametrize("inputs", [64, 128, 24, 100])
def test_rows_are_those_of_the_dense_matrix(inputs):
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
