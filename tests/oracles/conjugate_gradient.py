"""What conjugate gradients promise, computed without them: the minimum over a Krylov space."""

from __future__ import annotations

import numpy as np


def minimise(matrix: np.ndarray, gradient: np.ndarray, damping: float, steps: int) -> np.ndarray:
    """Return the minimum of the damped quadratic over ``span(g, Hg, …)``, by an orthogonal basis and a dense solve."""
    damped = matrix + damping * np.eye(len(gradient))
    if steps == 0:
        return np.zeros_like(gradient)
    basis = [gradient / np.linalg.norm(gradient)]
    for _ in range(steps - 1):
        vector = damped @ basis[-1]
        # Twice, because once leaves rounding errors that grow.
        for _ in range(2):
            vector = vector - np.stack(basis, 1) @ (np.stack(basis) @ vector)
        basis.append(vector / np.linalg.norm(vector))
    columns = np.stack(basis, 1)
    return -columns @ np.linalg.solve(columns.T @ damped @ columns, columns.T @ gradient)
