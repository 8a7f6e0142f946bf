"""An orthonormal basis of a block Krylov space, and the matrix restricted to it."""

from __future__ import annotations

import torch
from torch import Tensor

from cheapgrad.curvature.operators import AbstractOperator
from cheapgrad.curvature.spectra.probes import draw_normals
from cheapgrad.errors import OperatorError


class KrylovSpace:
    """Grows by one block of products at a time.

    Every new block is orthogonalised twice against all that came before, which is what "full reorthogonalisation"
    means: without it, rounding makes copies of the eigenvalues that have converged.

    Args:
        operator: symmetric; found out where it is not.
        block: columns multiplied at a time.
        generator: of the start, and of new directions where the space is exhausted.
    """

    def __init__(self, operator: AbstractOperator, block: int, generator: torch.Generator | None) -> None:
        self._operator, self._generator = operator, generator
        # Vectors are rows of a buffer that doubles when it is full.
        self._buffer_KP = torch.zeros(8, operator.shape[0], dtype=operator.dtype, device=operator.device)
        self._inner_KK = torch.zeros(0, 0, dtype=torch.float64)
        self._border_RR = torch.zeros(0, 0, dtype=torch.float64)
        self._scale = 0.0
        self.products, self.restarts = 0, 0
        start_PR = draw_normals(operator, block, generator)
        self._next_PR, _ = self._orthonormalize(start_PR / start_PR.norm(dim=0))

    @property
    def _basis_KP(self) -> Tensor:
        return self._buffer_KP[: len(self._inner_KK)]

    def extend(self, limit: int) -> None:
        """Multiply the next block, or as much of it as the limit on products allows."""
        block_PR = self._next_PR[:, : limit - self.products]
        image_PR = self._operator @ block_PR
        self.products += block_PR.shape[1]
        self._append(block_PR.T)
        rest_PR, inside_KR = _project_out(self._buffer_KP[: self.products], image_PR)
        self._grow(inside_KR.double().cpu())
        self._next_PR, border_RR = self._orthonormalize(rest_PR)
        self._border_RR = border_RR.double().cpu()

    def solve(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return all Ritz values ``[K]``, their residuals ``[K]``, and their weights on the basis ``[K, K]``."""
        values, weights = torch.linalg.eigh((self._inner_KK + self._inner_KK.T) / 2)
        last = self._border_RR.shape[1]
        residuals = (self._border_RR @ weights[len(weights) - last :]).norm(dim=0)
        # Below this, residuals are rounding and not knowledge.
        floor = torch.finfo(self._operator.dtype).eps * self._scale
        return values, residuals.clamp(min=floor), weights

    def combine(self, weights_KR: Tensor) -> Tensor:
        """Return the vectors ``[P, R]`` with these weights on the basis, at unit length."""
        vectors_PR = self._basis_KP.T @ weights_KR.to(self._basis_KP)
        return vectors_PR / vectors_PR.norm(dim=0)

    def _append(self, rows_RP: Tensor) -> None:
        known, new = len(self._inner_KK), len(rows_RP)
        if known + new > len(self._buffer_KP):
            room = min(max(2 * len(self._buffer_KP), known + new), self._operator.shape[0])
            grown_KP = torch.zeros(room, self._operator.shape[0]).to(self._buffer_KP)
            grown_KP[:known] = self._basis_KP
            self._buffer_KP = grown_KP
        self._buffer_KP[known : known + new] = rows_RP

    def _grow(self, inside_KR: Tensor) -> None:
        """Border the restricted matrix with a new block of columns, and see whether it is symmetric."""
        before, new = len(self._inner_KK), inside_KR.shape[1]
        grown_KK = torch.zeros(before + new, before + new, dtype=torch.float64)
        grown_KK[:before, :before] = self._inner_KK
        grown_KK[:, before:] = inside_KR
        expected_RK = torch.zeros(new, before, dtype=torch.float64)
        last = self._border_RR.shape[1]
        if before:
            expected_RK[:, before - last :] = self._border_RR[:new]
        grown_KK[before:, :before] = expected_RK
        self._scale = max(self._scale, float(inside_KR.norm(dim=0).max()))
        gap = float((inside_KR[:before] - expected_RK.T).abs().max()) if before else 0.0
        corner = inside_KR[before:]
        gap = max(gap, float((corner - corner.T).abs().max()))
        if gap > torch.finfo(self._operator.dtype).eps ** 0.5 * self._scale:
            raise OperatorError(
                f"the matrix is not symmetric, or not the same in every product: after {self.products} products two "
                f"entries that should be equal differ by {gap:.3g}, at a norm of {self._scale:.3g}; use float64, fixed "
                "batches and a deterministic model"
            )
        self._inner_KK = grown_KK

    def _orthonormalize(self, columns_PR: Tensor) -> tuple[Tensor, Tensor]:
        """Return orthonormal columns that span the given ones, and the triangle that gives them back.

        Where nothing new is left of a column, a random direction takes its place, with a row of zeros in the triangle:
        the space is invariant so far, and further eigenvalues lie outside of it.
        """
        size, block = columns_PR.shape
        count = min(block, size - len(self._inner_KK))
        triangle_RR = torch.zeros(count, block).to(columns_PR)
        done_RP = torch.zeros(0, size).to(columns_PR)
        negligible = 10 * torch.finfo(columns_PR.dtype).eps * max(self._scale, 1e-30) * size**0.5
        for index in range(count):
            column, along = _project_out(done_RP, columns_PR[:, index : index + 1])
            triangle_RR[:index, index : index + 1] = along
            length = column.norm()
            if length > negligible:
                triangle_RR[index, index] = length
            else:
                self.restarts += 1
                column = draw_normals(self._operator, 1, self._generator)
            if index or length <= negligible:
                # What was left over after a large part was taken away has to be cleaned once more.
                column, _ = _project_out(torch.cat([self._basis_KP, done_RP]), column)
            done_RP = torch.cat([done_RP, (column / column.norm()).T])
        return done_RP.T, triangle_RR


def _project_out(known_KP: Tensor, columns_PR: Tensor) -> tuple[Tensor, Tensor]:
    """Return columns without their parts along orthonormal rows, and those parts; twice, which is enough."""
    along_KR = torch.zeros(len(known_KP), columns_PR.shape[1]).to(columns_PR)
    for _ in range(2):
        part_KR = known_KP @ columns_PR
        columns_PR = columns_PR - known_KP.T @ part_KR
        along_KR += part_KR
    return columns_PR, along_KR
