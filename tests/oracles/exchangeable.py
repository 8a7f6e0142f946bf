"""Leave-one-out trace and diagonal estimates, as the definition says, with one projection per probe."""

from __future__ import annotations

import torch
from torch import Tensor


def _projection(columns: Tensor) -> Tensor:
    """Return the orthogonal projection on the span of columns."""
    left, values, _ = torch.linalg.svd(columns, full_matrices=False)
    left = left[:, values > 1e-10 * values.max()]
    return left @ left.T


def leave_one_out(matrix: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the trace estimates ``[K]`` and the diagonal estimates ``[P, K]``, one for each probe left out."""
    traces, diagonals = [], []
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    for index in range(signs.shape[1]):
        others = torch.cat([signs[:, :index], signs[:, index + 1 :]], 1)
        inside = _projection(matrix @ others)
        rest = (identity - inside) @ signs[:, index]
        traces.append(torch.trace(inside @ matrix @ inside) + rest @ matrix @ rest)
        outside = (identity - inside) @ matrix
        diagonals.append((inside @ matrix).diagonal() + signs[:, index] * (outside @ signs[:, index]))
    return torch.stack(traces), torch.stack(diagonals, 1)
