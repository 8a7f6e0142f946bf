"""Operators as such: shapes, means, other libraries' matrices, and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch

from cheapgrad.curvature import AbstractOperator, DenseOperator, MeanOperator, MicroBatch, as_operator
from cheapgrad.errors import NonFiniteCurvatureError, OperandError, OperatorError, ShapeError


def _symmetric(size: int, seed: int = 0) -> torch.Tensor:
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return matrix + matrix.T


class _Duck:
    """Another library's operator: a shape, ``@``, a dtype and a device."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix, self.shape, self.dtype, self.device = matrix, matrix.shape, matrix.dtype, matrix.device

    def __matmul__(self, columns: torch.Tensor) -> torch.Tensor:
        return self.matrix @ columns


MATRIX = _symmetric(5)
KINDS = {
    "tensor": MATRIX,
    "numpy": MATRIX.numpy(),
    "scipy sparse": scipy.sparse.csr_array(MATRIX.numpy()),
    "scipy LinearOperator": scipy.sparse.linalg.aslinearoperator(MATRIX.numpy()),
    "another library": _Duck(MATRIX),
    "mean": MeanOperator([DenseOperator(MATRIX), DenseOperator(MATRIX)]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_anything_with_shape_and_matmul_is_an_operator(kind: str) -> None:
    operator = as_operator(KINDS[kind])
    columns = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(operator @ columns, MATRIX @ columns, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(operator @ columns[:, 0], MATRIX @ columns[:, 0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(operator.to_dense(), MATRIX, rtol=1e-13, atol=1e-13)
    assert (operator @ columns[:, :0]).shape == (5, 0)
    assert (operator.shape, operator.dtype, operator.device) == ((5, 5), torch.float64, torch.device("cpu"))
    assert as_operator(operator) is operator


def test_an_operator_without_dtype_takes_the_one_given() -> None:
    class Bare:
        shape = (5, 5)

        def __matmul__(self, columns: torch.Tensor) -> torch.Tensor:
            return MATRIX.float() @ columns

    assert as_operator(Bare()).dtype == torch.float32
    assert as_operator(Bare(), dtype=torch.float64).dtype == torch.float64


def test_the_mean_weighs_by_examples_by_weights_or_alike() -> None:
    a, b = _symmetric(4, 1), _symmetric(4, 2)
    sized = MeanOperator([DenseOperator(a, example_count=3), DenseOperator(b, example_count=1)])
    torch.testing.assert_close(sized.to_dense(), 0.75 * a + 0.25 * b)
    assert sized.example_count == 4
    assert [part.weight for part in sized.micro_batches] == [0.75, 0.25]
    torch.testing.assert_close(MeanOperator([DenseOperator(a), DenseOperator(b)]).to_dense(), (a + b) / 2)
    weighted = MeanOperator([MicroBatch(DenseOperator(a), 0.2), MicroBatch(DenseOperator(b), 0.6)])
    torch.testing.assert_close(weighted.to_dense(), 0.25 * a + 0.75 * b)
    # What was left out of a fold is a mean again.
    torch.testing.assert_close(MeanOperator(sized.micro_batches[:1]).to_dense(), a)


def test_an_operator_without_parts_is_its_only_micro_batch() -> None:
    operator = DenseOperator(MATRIX, example_count=7)
    (part,) = operator.micro_batches
    assert part.operator is operator
    assert (part.weight, part.example_count) == (1.0, 7)


@pytest.mark.parametrize(
    ("operand", "error", "match"),
    [
        (torch.ones(4, dtype=torch.float64), ShapeError, r"\(4,\)"),
        (torch.ones(5, 1, 1, dtype=torch.float64), ShapeError, r"\(5, 1, 1\)"),
        (torch.ones(5), OperandError, "torch.float32"),
        ([1.0] * 5, OperandError, "list"),
        (torch.tensor([1.0, 0, 0, 0, torch.nan], dtype=torch.float64), NonFiniteCurvatureError, "has 1 entries"),
    ],
)
def test_bad_operands_are_named(operand: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        DenseOperator(MATRIX) @ operand  # type: ignore[operator]


def test_products_that_are_not_finite_are_named() -> None:
    with pytest.raises(NonFiniteCurvatureError, match="2 of 2 entries"):
        DenseOperator(torch.full((2, 2), 3e38)) @ torch.ones(2)


@pytest.mark.parametrize(
    ("matrix", "match"),
    [
        (torch.ones(2, 3), r"\(2, 3\)"),
        (torch.ones(0, 0), r"\(0, 0\)"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "by up to 2 at entries of up to 2"),
        (torch.ones(2, 2, dtype=torch.int64), "torch.int64"),
        (np.ones((2, 2), dtype=np.int64), "torch.int64"),
        (np.ones((2, 3)), r"\(2, 3\)"),
        ([[1.0]], "a list of 1, which has no shape and no __matmul__"),
    ],
)
def test_what_is_no_operator_is_named(matrix: object, match: str) -> None:
    with pytest.raises(OperatorError, match=match):
        as_operator(matrix)


def test_bad_means_are_named() -> None:
    with pytest.raises(OperatorError, match="got none"):
        MeanOperator([])
    with pytest.raises(OperatorError, match="got -1"):
        MeanOperator([MicroBatch(DenseOperator(MATRIX), -1)])
    with pytest.raises(OperatorError, match=r"\(2, 2\) torch.float32 cpu, \(5, 5\)"):
        MeanOperator([DenseOperator(torch.eye(2)), DenseOperator(MATRIX)])


def test_a_foreign_operator_that_returns_another_shape_is_named() -> None:
    class Flat(_Duck):
        def __matmul__(self, columns: torch.Tensor) -> torch.Tensor:
            return (self.matrix @ columns)[:, 0]

    with pytest.raises(ShapeError, match=r"a Flat returned the shape \(5,\)"):
        as_operator(Flat(MATRIX)) @ torch.ones(5, 2, dtype=torch.float64)


def test_an_operator_cannot_be_built_without_its_products() -> None:
    with pytest.raises(TypeError, match="_multiply"):
        AbstractOperator()  # type: ignore[abstract]
