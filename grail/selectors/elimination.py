"""Units leave a quadratic problem one at a time: optimal brain surgeon updates, exact and in blocks.

Shapes: H width, O outputs, U units of S consecutive channels, B channels since the last block update.

For a positive definite matrix M and a weight W, taking unit g out changes
    W ← W − W_g M_gg⁻¹ M_g:    M ← M − M_:g M_gg⁻¹ M_g:    at a cost of tr(W_g M_gg⁻¹ W_gᵀ).
With M = H⁻¹ this removes g and lets the remaining weights make up for it (OBS, Hassibi and Stork 1993): the cost is
the growth of the least tr((W − W') H (W − W')ᵀ). With M = H and W H in place of W it is one step of a block-pivoted
Cholesky factorisation of H: the cost is what keeping g takes off the part of W's output not yet explained.

As in LAPACK's blocked pivoted Cholesky, the changes of M and W are kept as products of thin matrices and applied by
GEMM once per block. Only the diagonal blocks, which the costs need, are always current. So exact greedy elimination
costs 2 H² per channel in GEMM and one product of W with a vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from grail_kernels import PackedSymmetric, RidgeError, RidgeSolution, ridge_solve

from ..errors import GrailError
from .base import Damping

Note = Callable[[Damping], object]
BLOCK = 64
"""Channels between two block updates, unless one unit is wider."""


def ignored(damping: Damping) -> None:
    """Nobody wants to know."""


def damped_inverse(matrix: PackedSymmetric, damping: float, name: str, note: Note = ignored) -> Tensor:
    """(G + λI)⁻¹, dense float64 [H, H], λ = damping · mean(diag G), raised by grail_kernels' rule where G needs more.

    note: is told. The peak is about five float64 matrices of size H (5 GB at H = 11008); one remains.
    Raises GrailError naming the site when no λ up to mean(diag G) works.
    """
    eye_HH = torch.eye(matrix.width, dtype=torch.float64, device=matrix.device)
    return _solve(matrix.to_dense(), eye_HH, damping, name, note).solution


def damped_dense(matrix: PackedSymmetric, damping: float, name: str, note: Note = ignored) -> Tensor:
    """G + λI, dense float64 [H, H], with the λ of `damped_inverse`."""
    dense_HH = matrix.to_dense()
    probe_H1 = torch.ones(matrix.width, 1, dtype=torch.float64, device=matrix.device)
    lam = _solve(dense_HH, probe_H1, damping, name, note).lam
    dense_HH = dense_HH.double()
    dense_HH.diagonal().add_(lam)
    return dense_HH


def _solve(dense_HH: Tensor, rhs_HM: Tensor, damping: float, name: str, note: Note) -> RidgeSolution:
    lam = damping * dense_HH.diagonal().double().mean().item()
    if not math.isfinite(lam):
        raise GrailError(f"{name}: the Gram matrix holds NaN or infinity; check the checkpoint and the text")
    try:
        found = ridge_solve(dense_HH, rhs_HM, lam, solve_dtype=torch.float64)
    except RidgeError as error:
        raise GrailError(f"{name}: the Gram matrix cannot be inverted: {error}; use more calibration text") from error
    note(Damping(lam, found.lam, found.retries))
    return found


class Elimination:
    """Takes units out of (M, W) as in the module's docstring; what is left stays in its place, `alive` says where.

    matrix_HH: float64 [H, H], owned and overwritten; weight_OH [O, H], copied to float64; size: channels per unit.
    """

    def __init__(self, matrix_HH: Tensor, weight_OH: Tensor, size: int, name: str):
        self.size, self.name = size, name
        self._matrix_HH = matrix_HH
        self._weight_HO = weight_OH.to(matrix_HH).mT.contiguous()
        width, outputs = self._weight_HO.shape
        self.alive = torch.ones(width // size, dtype=torch.bool, device=matrix_HH.device)
        parts_USO = self._weight_HO.view(-1, size, outputs)
        self._energy_USS = parts_USO @ parts_USO.mT
        blocks_SSU = matrix_HH.view(width // size, size, width // size, size).diagonal(dim1=0, dim2=2)
        self._pivot_USS = blocks_SSU.permute(2, 0, 1).clone()
        capacity = max(BLOCK // size, 1) * size
        self._filled = 0
        self._ratio_BH, self._column_BH = matrix_HH.new_empty(2, capacity, width)
        self._removed_BO = matrix_HH.new_empty(capacity, outputs)

    def costs(self) -> Tensor:
        """tr(W_g M_gg⁻¹ W_gᵀ) of each unit, float64 [U]; NaN for those that are out.

        Raises GrailError naming the site when a block is singular or the weight is not finite.
        """
        pivot_USS, energy_USS = self._pivot_USS[self.alive], self._energy_USS[self.alive]
        solved_USS = self._divide(pivot_USS, energy_USS)
        costs_U = torch.full(self.alive.shape, math.nan, dtype=torch.float64, device=self.alive.device)
        costs_U[self.alive] = solved_USS.diagonal(dim1=-2, dim2=-1).sum(-1)
        if not torch.isfinite(costs_U[self.alive]).all():
            raise GrailError(f"{self.name}: the consumer's weight holds NaN or infinity; check the checkpoint")
        return costs_U

    def eliminate(self, unit: int) -> None:
        """Take one unit out. Raises GrailError naming the site when its block is singular."""
        size, filled = self.size, self._filled
        rows = slice(unit * size, (unit + 1) * size)
        ratio_BH, column_BH, removed_BO = (
            t[:filled] for t in (self._ratio_BH, self._column_BH, self._removed_BO)
        )  # M = matrix − Σ column ⊗ ratio and W = weight − Σ ratio ⊗ removed until the next block update
        column_SH = self._matrix_HH[rows] - column_BH[:, rows].mT @ ratio_BH
        removed_SO = self._weight_HO[rows] - ratio_BH[:, rows].mT @ removed_BO
        product_SH = removed_SO @ self._weight_HO.mT - (removed_SO @ removed_BO.mT) @ ratio_BH
        ratio_SH = self._divide(column_SH[:, rows], column_SH)
        half_SH = product_SH - 0.5 * product_SH[:, rows] @ ratio_SH

        ratio_USS, half_USS = self._per_unit(ratio_SH), self._per_unit(half_SH)
        self._pivot_USS -= self._per_unit(column_SH) @ ratio_USS.mT
        cross_USS = ratio_USS @ half_USS.mT
        self._energy_USS -= cross_USS + cross_USS.mT

        into = slice(filled, filled + size)
        self._ratio_BH[into], self._column_BH[into], self._removed_BO[into] = ratio_SH, column_SH, removed_SO
        self._filled += size
        self.alive[unit] = False
        if self._filled == len(self._ratio_BH):
            self._apply()

    def matrix(self) -> Tensor:
        """M over the channels still in, float64 [C, C]."""
        self._apply()
        channels = self.alive.repeat_interleave(self.size)
        return self._matrix_HH[channels][:, channels]

    def weight(self) -> Tensor:
        """W over the channels still in, float64 [O, C]: with M = H⁻¹ the weights that OBS leaves."""
        self._apply()
        return self._weight_HO[self.alive.repeat_interleave(self.size)].mT

    def _apply(self) -> None:
        ratio_BH = self._ratio_BH[: self._filled]
        self._matrix_HH.addmm_(self._column_BH[: self._filled].mT, ratio_BH, alpha=-1)
        self._weight_HO.addmm_(ratio_BH.mT, self._removed_BO[: self._filled], alpha=-1)
        self._filled = 0

    def _per_unit(self, rows_SH: Tensor) -> Tensor:
        """[S, H] -> [U, S, S], its second index the channel within the unit."""
        return rows_SH.view(self.size, -1, self.size).permute(1, 2, 0)

    def _divide(self, pivot: Tensor, rhs: Tensor) -> Tensor:
        """pivot⁻¹ rhs for [..., S, S] and [..., S, M]."""
        singular = f"{self.name}: a block of the inverse Gram matrix became singular; use a larger --set damping=..."
        if self.size == 1:
            if not (pivot > 0).all():
                raise GrailError(singular)
            return rhs / pivot
        try:
            solved = ridge_solve(pivot, rhs, 0.0, solve_dtype=torch.float64, backend="torch")  # float64 on a GPU too
        except RidgeError as error:
            raise GrailError(singular) from error
        retries = solved.retries if isinstance(solved.retries, list) else [solved.retries]
        if any(retries):
            raise GrailError(singular)
        return solved.solution


def greedy(work: Elimination, groups: int, moves: int, *, batch: int = 1, largest: bool = False) -> list[int]:
    """Take out `moves` units of each of `groups` equal groups, always those of least (or `largest`) cost, and return
    them in that order. The costs are renewed after every `batch` units.

    Among equals the lower number is the one that is kept: the last to go, or the first to be taken as the largest.
    """
    count = len(work.alive)
    left = [moves] * groups
    picked: list[int] = []
    while len(picked) < groups * moves:
        costs_U = work.costs().cpu()  # NaN, hence last in either order, where a unit is out
        if largest:
            order_U = (-costs_U).argsort(stable=True)
        else:
            order_U = count - 1 - costs_U.flip(0).argsort(stable=True)
        taken = 0
        for unit in order_U.tolist():
            group = unit * groups // count
            if left[group]:
                left[group] -= 1
                work.eliminate(unit)
                picked.append(unit)
                taken += 1
            if taken == batch:
                break
    return picked
