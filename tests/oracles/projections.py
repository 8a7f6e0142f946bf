"""Dense matrices of the structured projections."""

from __future__ import annotations

import numpy as np
from scipy import linalg


def hadamard(size: int) -> np.ndarray:
    """Return the orthonormal Walsh-Hadamard matrix of a power of two."""
    return linalg.hadamard(size) / np.sqrt(size)


def subsampled_hadamard(signs: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return ``sqrt(N' / K) P H D`` as a matrix ``[K, N]``, N' the next power of two."""
    padded = 1
    while padded < len(signs):
        padded *= 2
    return np.sqrt(padded / len(kept)) * hadamard(padded)[kept, : len(signs)] * signs


def count_sketch(bins: np.ndarray, signs: np.ndarray, count: int) -> np.ndarray:
    """Return the matrix ``[K, N]`` with one signed entry per column."""
    matrix = np.zeros((count, len(bins)))
    matrix[bins, np.arange(len(bins))] = signs
    return matrix


def error_of_product(matrices: list[np.ndarray], left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, float]:
    """Return mean and mean squared error of ``(S left).T (S right)`` over equally likely S."""
    truth = left.T @ right
    estimates = [(matrix @ left).T @ (matrix @ right) for matrix in matrices]
    squared = np.mean([((estimate - truth) ** 2).sum() for estimate in estimates])
    return np.mean(estimates, axis=0), float(squared)
