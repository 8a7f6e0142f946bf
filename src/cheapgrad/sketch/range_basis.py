"""A randomised basis of a matrix's row space, renewed now and then."""

from __future__ import annotations

import torch
from torch import Tensor

from cheapgrad.sketch import random
from cheapgrad.sketch.transforms import is_transformed


def _draw_start(matrix_ND: Tensor, count: int) -> Tensor:
    return random.normal(matrix_ND, (matrix_ND.shape[1], count))


def find_range(matrix_ND: Tensor, count: int, start_DR: Tensor | None = None) -> Tensor:
    """Return an orthonormal basis ``[D, R]`` close to the leading right singular vectors.

    One power iteration on a random start: ``qr(M.T M Omega)``.

    Args:
        matrix_ND: M, shape ``[N, D]``.
        count: R, at most D.
        start_DR: the random start, drawn here if None.

    References:
        N. Halko, P.-G. Martinsson and J. Tropp, SIAM Rev. 53 (2011), algorithm 4.3 with q = 1 on the transposed side.
    """
    dtype = torch.promote_types(matrix_ND.dtype, torch.float32)
    clean = torch.nan_to_num(matrix_ND.to(dtype), nan=0.0, posinf=0.0, neginf=0.0)
    start_DR = _draw_start(matrix_ND, count) if start_DR is None else start_DR
    return torch.linalg.qr(clean.mT @ (clean @ start_DR.to(dtype))).Q.to(matrix_ND.dtype)


class RangeBasis:
    """Holds a layer's basis between renewals.

    Inside compiled graphs and torch.func transforms nothing is held: the basis is found anew in every step.

    Args:
        refresh: uses between two renewals.
    """

    def __init__(self, refresh: int) -> None:
        self._refresh = refresh
        self._uses = 0
        self._basis_DR: Tensor | None = None

    @property
    def held_DR(self) -> Tensor | None:
        """The basis as it is held, or None before the first use."""
        return self._basis_DR

    def basis_for(self, matrix_ND: Tensor, count: int) -> Tensor:
        """Return the held basis, renewed from `matrix_ND` when it is due."""
        if torch.compiler.is_compiling() or is_transformed(matrix_ND):
            return find_range(matrix_ND, count)
        # Drawn in every use: a checkpoint's second forward, which need not renew, has to leave the same random state.
        start_DR = _draw_start(matrix_ND, count)
        held = self._basis_DR
        fits = held is not None and held.shape == (matrix_ND.shape[1], count) and held.device == matrix_ND.device
        if not fits or self._uses % self._refresh == 0:
            held = self._basis_DR = find_range(matrix_ND.detach(), count, start_DR)
            self._uses = 0
        self._uses += 1
        assert held is not None
        return held.to(matrix_ND.dtype)
