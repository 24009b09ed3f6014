"""Candidates for one site, judged on windows of their own that enter no statistic: how much of the stream's error it
should take on (α), and the ridge.

For each ridge the error Σ ‖t − W'(α) z − b'(α)‖² is a parabola in α, known from moments of z and t. A token counts by
how large the streams are there, 1 / max(mean(r_d²), mean(r_c²)): what reads the stream normalises it. Without r_c the
few tokens where only the compressed stream is huge (massive activations) would outweigh all others.
Shapes: O outputs, K kept (plus one of the constant 1, where there is a bias); T tokens, B some outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grail_kernels import CrossAccumulator, GramAccumulator

from .distributed import Group
from .moments import dot
from .normal_equations import blocks, share_of

TINY = 1e-20
"""No token counts more than one whose mean square this is."""
NOTHING = 1e-6
"""A smaller share of the error is not worth a change."""
RIDGES = (1e-3, 1e-2, 1e-1)
"""Candidates of --ridge auto."""
PRIOR, PRIOR_WINDOWS = 0.5, 16
"""An α that was good at most sites of SmolLM2 (docs/results.md), and how many deciding windows it counts as: the best
one on a few windows of one site is mostly chance."""


def importance(*streams_XD: Tensor) -> Tensor:
    """How much each token counts that has these streams [...], 1 / mean(r²) of the largest."""
    sizes = [stream_XD.square().mean(-1) for stream_XD in streams_XD]
    return 1 / torch.stack(sizes).amax(0).clamp(min=TINY)


class TrialMoments:
    """Σ w z zᵀ, Σ w z tᵀ and Σ w ‖t‖² of this process's held-out rows: with them a candidate costs as much for many
    rows as for few. biased: candidates have a bias; windows: how many decide, of all processes."""

    def __init__(self, width: int, outputs: int, *, device: torch.device, biased: bool, windows: int = 0):
        self.windows, self.biased = windows, biased
        self.total = 0.0
        self._gram = GramAccumulator(width + biased, device=device)
        self._cross = CrossAccumulator(width + biased, outputs, device=device)

    def update(self, z: Tensor, target: Tensor, weight: Tensor) -> None:
        """Add rows z [..., K] and t [..., O], and how much each counts [...]."""
        scale_T1 = weight.reshape(-1, 1).float().sqrt()
        z_TK, t_TO = (rows.reshape(-1, rows.shape[-1]).float() * scale_T1 for rows in (z, target))
        z_TK = torch.cat([z_TK, scale_T1], 1) if self.biased else z_TK
        self._gram.update(z_TK)
        self._cross.update(z_TK, t_TO)
        self.total += dot(t_TO, t_TO)

    def errors(self, own: tuple[Tensor, Tensor | None], stream: tuple[Tensor, Tensor | None]) -> TrialErrors:
        """Those of P and b₀, and S and b₁ (None: no bias; [O, K] and [O])."""
        found, gram = TrialErrors(self.total, self.total, windows=self.windows), self._gram.packed
        for outputs in blocks(own[0]):
            own_BK, stream_BK = (self._rows(*candidate, outputs) for candidate in (own, stream))
            cross_BK, made_BK = self._cross.value[:, outputs].mT, gram.matmul(stream_BK.mT).mT
            found.own += gram.quadratic_trace(own_BK) - 2 * dot(own_BK, cross_BK)
            found.mixed += dot(stream_BK, cross_BK) - dot(own_BK, made_BK)
            found.stream += dot(stream_BK, made_BK)
        return found

    def _rows(self, weight_OK: Tensor, bias_O: Tensor | None, outputs: slice) -> Tensor:
        rows_BK = weight_OK[outputs].float()
        if not self.biased:
            return rows_BK
        bias_B = rows_BK.new_zeros(len(rows_BK)) if bias_O is None else bias_O[outputs].float()
        return torch.cat([rows_BK, bias_B[:, None]], 1)


@dataclass
class TrialErrors:
    """Sums over tokens: of ‖t‖², and of the products of u = t − P z − b₀ and v = S z + b₁. windows: how many decide,
    of all processes."""

    total: float = 0.0
    own: float = 0.0
    mixed: float = 0.0
    stream: float = 0.0
    windows: int = 0

    def sum_over(self, group: Group) -> TrialErrors:
        """Those of all processes, the same on each."""
        numbers = torch.tensor([self.total, self.own, self.mixed, self.stream], dtype=torch.float64)
        return TrialErrors(*group.sum_(numbers).tolist(), windows=self.windows)

    @property
    def best_alpha(self) -> float:
        """The α in 0..1 of the least error; 0 where that gains nothing but rounding."""
        if not self.stream > 0 or self.mixed <= 0:
            return 0.0
        alpha = min(self.mixed / self.stream, 1.0)
        return alpha if alpha * (2 * self.mixed - alpha * self.stream) > NOTHING * self.own else 0.0

    @property
    def cautious_alpha(self) -> float:
        """The best α drawn towards PRIOR, the more the fewer windows decide; as far as the error is not above that of
        α = 0, so that it is 0 where there is nothing to gain."""
        drawn = (self.windows * self.best_alpha + PRIOR_WINDOWS * PRIOR) / (self.windows + PRIOR_WINDOWS)
        return min(drawn, 2 * self.best_alpha)

    def at(self, alpha: float) -> float:
        """The error at an α, as a share of Σ ‖t‖²."""
        error = self.own - 2 * alpha * self.mixed + alpha**2 * self.stream
        return share_of(error, self.total)
