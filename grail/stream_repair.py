"""The repair towards the residual stream: a consumer also makes up for what all sites before it got wrong.

Beside the compressed network runs the dense one. t = r_d − r_c is what the consumer would have to add to the compressed
stream to arrive at the dense one, W h (with its bias) what it adds as it is, D = t − W h the difference. The target is
W h + α D, so that with G = Σ h hᵀ and M = Σ h Dᵀ

    W'(α) = P + α S,   P = W B0 + (W G Rᵀ − W B0 A)(A + λI)⁻¹,   S = Mᵀ Rᵀ (A + λI)⁻¹:

P is the repair of the site on its own (compensation.py). Where the compressed vector z is not R h (folding), A, and the
right-hand sides Σ z (W h − W B0 z)ᵀ and Σ z Dᵀ are moments of z. With a bias all moments are about the means.

A further sweep (--sweeps) takes the W' that was chosen for P, and for S what it leaves of the whole target t:
S' = (Σ z tᵀ − A W'ᵀ)ᵀ (A + λI)⁻¹, iterated Tikhonov regularisation (Engl 1987), with its own α and λ.

Shapes: O outputs, H width, K kept; B some outputs, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from grail_kernels import PackedSymmetric, RidgeSolution
from grail_kernels.inputs import isolated
from grail_kernels.ridge import MatrixRows

from .moments import CrossMoments, PairStatistics
from .normal_equations import ANCHORED, blocks, consumed, relative, rounded, share_of, solve
from .reduction import Reduction


@dataclass
class StreamSystem:
    """The normal equations of one site. anchor: rows of W B0, float64 [B, K]; matrix: A; own and stream: the two
    right-hand sides, float64 [K, O], made anew at each call (own None: P is the anchor); scale: mean(diag A), of which
    --ridge is a share; effective_rank: as in compensation.Compensation."""

    name: str
    form: str
    weight: Tensor
    matrix: MatrixRows
    scale: float
    anchor: Callable[[slice], Tensor]
    own: Callable[[], Tensor] | None
    stream: Callable[[], Tensor]
    effective_rank: float

    @classmethod
    def of_selection(
        cls,
        weight_OH: Tensor,
        gram: PackedSymmetric,
        cross_HO: Tensor,
        reduction: Reduction,
        *,
        form: str,
        name: str,
    ) -> StreamSystem:
        """z = R h: everything follows from G (or the scatter) and M."""
        channels = reduction.channels.to(cross_HO.device)
        size = reduction.kept_width
        form = ANCHORED if reduction.is_identity else form  # what loses nothing is not shrunk
        return cls(
            name,
            form,
            weight_OH,
            MatrixRows(size, gram.device, lambda start, end: reduction.normal_matrix(gram, start, end)),
            relative(1.0, reduction.normal_diagonal(gram), name),
            lambda outputs: reduction.lift_consumer(weight_OH[outputs].double()),
            lambda: consumed(weight_OH, gram, reduction, form).mT,
            lambda: cross_HO[channels].double(),
            gram.effective_rank(),
        )

    @classmethod
    def of_pairs(
        cls, anchor_OK: Tensor, pairs: PairStatistics, stream: CrossMoments, *, form: str, name: str
    ) -> StreamSystem:
        """Of moments of z: `pairs` of what W_a gets wrong about W h, `stream` of D."""
        normal, channels = pairs.normal, torch.arange(pairs.normal.width)

        def own() -> Tensor:
            rhs_KO = pairs.cross.to(torch.float64, copy=True)
            for outputs in blocks(anchor_OK) if form != ANCHORED else ():
                rhs_KO[:, outputs] += normal.matmul(anchor_OK[outputs].double().mT)
            return rhs_KO

        return cls(
            name,
            form,
            anchor_OK,
            MatrixRows(normal.width, normal.device, lambda start, end: normal.gather(channels[start:end], channels)),
            relative(1.0, normal.diagonal().double(), name),
            lambda outputs: anchor_OK[outputs].double(),
            own,
            lambda: stream.cross.to(torch.float64, copy=True),
            normal.effective_rank(),
        )

    @property
    def is_further(self) -> bool:
        """Whether a sweep went before."""
        return self.own is None

    def after(self, weight_OK: Tensor) -> StreamSystem:
        """The next sweep's: from a weight, float64, towards what it leaves. Of the first sweep's system alone."""
        return replace(
            self,
            form=ANCHORED,
            anchor=lambda outputs: weight_OK[outputs],
            own=None,
            stream=lambda: self._left(weight_OK),
        )

    def _left(self, weight_OK: Tensor) -> Tensor:
        """Σ z (t − W' z)ᵀ, float64 [K, O]."""
        left_KO = self.own().add_(self.stream())
        for rows, block_RK in self.matrix.blocks():
            for outputs in blocks(weight_OK):
                change_BK = weight_OK[outputs]
                if self.form == ANCHORED:
                    change_BK = change_BK - self.anchor(outputs)
                left_KO[rows, outputs] -= block_RK.double() @ change_BK.mT
        return left_KO


class Figures(NamedTuple):
    """How a system was solved, as in compensation.Compensation."""

    lam: float
    retries: int
    info: int
    rcond: float
    raised: tuple[float, float] | None


class StreamSolution:
    """P and S for one λ (absolute, raised where needed); with `alpha` given P + α S alone. Raises GrailError naming the
    site when no λ gives a usable factorisation."""

    @isolated
    def __init__(self, system: StreamSystem, lam: float, alpha: float | None = None):
        self.system, self.alpha = system, alpha
        self.outputs = len(system.weight) if alpha is None and not system.is_further else 0
        if system.is_further:
            rhs_KM = system.stream()
            rhs_KM = rhs_KM if alpha is None else rhs_KM.mul_(alpha)
        elif alpha is None:
            rhs_KM = torch.cat([system.own().mT, system.stream().mT]).mT
        else:
            rhs_KM = system.own()
            rhs_KM = rhs_KM.add_(system.stream(), alpha=alpha) if alpha else rhs_KM
        self.solved: RidgeSolution = solve(system.matrix, rhs_KM, lam, system.name)
        self.raised = (lam, self.solved.lam) if self.solved.retries else None

    @property
    def figures(self) -> Figures:
        """Without the solution."""
        return Figures(self.solved.lam, self.solved.retries, self.solved.info, self.solved.rcond, self.raised)

    def own(self, outputs: slice) -> Tensor:
        """Rows of P, float64 [B, K]; only where no α was given."""
        if self.system.is_further:
            return self.system.anchor(outputs)
        return self._anchored(outputs, self.solved.solution.mT[: self.outputs][outputs])

    def stream(self, outputs: slice) -> Tensor:
        """Rows of S, float64 [B, K]; only where no α was given."""
        return self.solved.solution.mT[self.outputs :][outputs]

    def weight(self, alpha: float, dtype: torch.dtype) -> Tensor:
        """W'(α), [O, K]."""

        def wide(outputs: slice) -> Tensor:
            if self.alpha is not None:
                return self._anchored(outputs, self.solved.solution.mT[outputs])
            return self.own(outputs).add(self.stream(outputs), alpha=alpha)

        return rounded(wide, self.system.weight, self.system.matrix.size, dtype, self.system.name)

    def _anchored(self, outputs: slice, rows_BK: Tensor) -> Tensor:
        return self.system.anchor(outputs) + rows_BK if self.system.form == ANCHORED else rows_BK


def selection_errors(
    weight_OH: Tensor, candidates: list[Tensor], reduction: Reduction, gram: PackedSymmetric, stream: CrossMoments
) -> list[float]:
    """Σ‖t − W' R h − b'‖² / Σ‖t‖² for each W' [O, K], over the rows behind the moments; with a bias its best, and
    both sums about the means."""
    energies, cross_HO = [stream.difference_energy for _ in candidates], stream.cross
    for outputs in blocks(weight_OH):
        weight_BH, cross_BH = weight_OH[outputs].float(), cross_HO[:, outputs].mT
        for i, candidate in enumerate(candidates):
            delta_BH = weight_BH - reduction.expand_consumer(candidate[outputs].float())
            lost = 2 * torch.sum(delta_BH * cross_BH, dtype=torch.float64).item()
            energies[i] += gram.quadratic_trace(delta_BH) + lost
    return [share_of(energy, stream.target_energy) for energy in energies]


def pair_errors(
    anchor_OK: Tensor, candidates: list[Tensor], pairs: PairStatistics, stream: CrossMoments, mixed: float
) -> list[float]:
    """The same from moments of z; mixed: Σ (W h − W_a z)·D, about the means with a bias."""
    start = pairs.difference_energy + stream.difference_energy + 2 * mixed
    energies, cross_KO = [start for _ in candidates], pairs.cross + stream.cross
    for outputs in blocks(anchor_OK):
        for i, candidate in enumerate(candidates):
            delta_BK = candidate[outputs].double() - anchor_OK[outputs].double()
            gained = 2 * torch.sum(delta_BK * cross_KO[:, outputs].mT, dtype=torch.float64).item()
            energies[i] += pairs.normal.quadratic_trace(delta_BK) - gained
    return [share_of(energy, stream.target_energy) for energy in energies]
