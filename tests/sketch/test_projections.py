"""Projections: the drawn map equals a dense matrix; mean and variance by enumeration of all signs and coordinates."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from cheapgrad.errors import BudgetError, PlacementError
from cheapgrad.sketch import CountSketch, Gaussian, Hadamard, Rademacher, RowProjection
from cheapgrad.sketch.bits import pack_bits
from cheapgrad.sketch.projections._abstract import Moments
from cheapgrad.sketch.projections.count_sketch import DrawnHash
from cheapgrad.sketch.projections.hadamard import DrawnHadamard, hadamard_transform, padded_size
from cheapgrad.sketch.projections.rademacher import DrawnSigns
from tests.oracles import projections as oracle
from tests.sketch.cases import KINDS

LIKE = torch.zeros(1, dtype=torch.float64)


def _matrix_of(drawn):
    """Return the dense matrix of a drawn projection, read off the identity."""
    return drawn.project(torch.eye(drawn.size, dtype=torch.float64)).numpy()


@pytest.mark.parametrize("size", [1, 2, 64, 128, 4096])
def test_the_transform_is_walsh_hadamard(size):
    matrix = torch.randn(size, 3, dtype=torch.float64)
    torch.testing.assert_close(
        hadamard_transform(matrix), torch.as_tensor(oracle.hadamard(size)) @ matrix, rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize(("size", "padded"), [(1, 1), (2, 2), (3, 4), (21, 32), (32, 32), (33, 64)])
def test_padded_size(size, padded):
    assert padded_size(size) == padded


@pytest.mark.parametrize("size", [1, 7, 8, 21])
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_transpose_and_rebuilding(kind, size):
    count = max(1, size // 2)
    drawn = kind.draw(LIKE, size, count)
    matrix = torch.as_tensor(_matrix_of(drawn))
    assert matrix.shape == (count, size)
    lifted = drawn.transpose_project(torch.eye(count, dtype=torch.float64))
    torch.testing.assert_close(lifted, matrix.T, rtol=1e-12, atol=1e-12)
    again = kind.rebuild(drawn.tensors(), size, count, LIKE)
    np.testing.assert_array_equal(_matrix_of(again), matrix)
    assert kind.saved_bytes(size, count) == sum(
        tensor.numel() * tensor.element_size() for tensor in kind.draw(LIKE.float(), size, count).tensors()
    )


def test_hadamard_is_the_dense_matrix():
    drawn = Hadamard().draw(LIKE, 21, 9)
    negative, kept = drawn.tensors()
    signs = 1 - 2 * negative.numpy().astype(float)
    np.testing.assert_allclose(_matrix_of(drawn), oracle.subsampled_hadamard(signs, kept.numpy()), atol=1e-12)


def _all_hadamards(size, count):
    for signs in itertools.product((False, True), repeat=size):
        for kept in itertools.combinations(range(padded_size(size)), count):
            yield DrawnHadamard(torch.tensor(signs), torch.tensor(kept))


def _all_signs(size, count):
    for signs in itertools.product((0, 1), repeat=size * count):
        yield DrawnSigns(pack_bits(torch.tensor(signs, dtype=torch.uint8), 1), size, count)


def _all_hashes(size, count):
    for signed in itertools.product(range(-count, count), repeat=size):
        yield DrawnHash(torch.tensor(signed), count)


ENUMERATED = [
    pytest.param(Hadamard(), _all_hadamards, 4, 2, id="Hadamard, power of two"),
    pytest.param(Hadamard(), _all_hadamards, 3, 2, id="Hadamard, padded"),
    pytest.param(Hadamard(), _all_hadamards, 5, 3, id="Hadamard, padded more"),
    pytest.param(Rademacher(), _all_signs, 5, 2, id="Rademacher"),
    pytest.param(Rademacher(), _all_signs, 3, 3, id="Rademacher, square"),
    pytest.param(CountSketch(), _all_hashes, 4, 2, id="CountSketch"),
    pytest.param(CountSketch(), _all_hashes, 3, 3, id="CountSketch, as many bins as rows"),
]


@pytest.mark.parametrize(("kind", "list_all", "size", "count"), ENUMERATED)
def test_mean_and_variance_by_enumeration(kind, list_all, size, count):
    generator = np.random.default_rng(size)
    stored, cotangent, weight = (generator.normal(size=shape) for shape in ((size, 3), (size, 2), (2, 3)))
    matrices = [_matrix_of(drawn) for drawn in list_all(size, count)]
    mean, squared_error = oracle.error_of_product(matrices, cotangent, stored)
    np.testing.assert_allclose(mean, cotangent.T @ stored, rtol=1e-11, atol=1e-12)
    moments = Moments(
        product=torch.tensor((stored**2).sum() * (cotangent**2).sum()),
        rows=torch.tensor(((stored**2).sum(1) * (cotangent**2).sum(1)).sum()),
        gradient=torch.tensor(((cotangent.T @ stored) ** 2).sum()),
    )
    assert float(kind.weight_variance(moments, size, count)) == pytest.approx(squared_error, rel=1e-11)

    grams = [matrix.T @ matrix for matrix in matrices]
    np.testing.assert_allclose(np.mean(grams, axis=0), np.eye(size), atol=1e-12)
    exact = cotangent @ weight
    spread = np.mean([((gram @ exact - exact) ** 2).sum() for gram in grams])
    assert kind.input_factor(size, count) * (exact**2).sum() == pytest.approx(spread, rel=1e-11)


@pytest.mark.parametrize(("kind", "list_all"), [(Rademacher(), _all_signs), (CountSketch(), _all_hashes)])
def test_the_enumerated_maps_are_those_that_are_drawn(kind, list_all):
    listed = {_matrix_of(drawn).round(9).tobytes() for drawn in list_all(3, 2)}
    drawn = {_matrix_of(kind.draw(LIKE, 3, 2)).round(9).tobytes() for _ in range(1500)}
    assert drawn == listed


def test_gaussian_has_the_second_and_fourth_moments_of_a_normal_number():
    matrix = Gaussian().draw(LIKE, 400, 500).tensors()[0].double() * 500**0.5
    entries = matrix.numel()
    assert abs(float(matrix.mean())) < 5 / entries**0.5
    assert float(matrix.square().mean()) == pytest.approx(1, abs=5 * (2 / entries) ** 0.5)
    assert float(matrix.pow(4).mean()) == pytest.approx(3, abs=5 * (96 / entries) ** 0.5)


@pytest.mark.parametrize("rows", [5, 32])
def test_hadamard_of_full_size_is_exact_for_powers_of_two_only(rows):
    factor = Hadamard().input_factor(rows, rows)
    assert (factor == 0) == (rows == 32)


def test_a_kind_that_is_none():
    with pytest.raises(PlacementError, match=r"kind must be Rademacher\(\).*but got 'gaussian'"):
        RowProjection(keep=0.5, kind="gaussian")


def test_keep_out_of_range():
    with pytest.raises(BudgetError, match=r"keep must be in \(0, 1\], but got 1.5"):
        RowProjection(keep=1.5)
