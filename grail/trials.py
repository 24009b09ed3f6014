"""Candidates for one site, judged on windows of their own that enter no statistic: how much of the stream's error it
should take on (α), and the ridge.

For each ridge the error Σ ‖t − W'(α) z − b'(α)‖² is a parabola in α, known from three sums. A token counts by how large
the dense stream is there, 1 / mean(r_d²): what reads the stream normalises it.
Shapes: O outputs, K kept; T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .distributed import Group

NOTHING = 1e-6
"""A smaller share of the error is not worth a change."""
RIDGES = (1e-3, 1e-2, 1e-1)
"""Candidates of --ridge auto."""


@dataclass
class TrialErrors:
    """Sums over tokens: of ‖t‖², and of the products of u = t − P z − b₀ and v = S z + b₁."""

    total: float = 0.0
    own: float = 0.0
    mixed: float = 0.0
    stream: float = 0.0

    @classmethod
    def of(
        cls,
        rows: Iterable[tuple[Tensor, Tensor, Tensor]],
        own: tuple[Tensor, Tensor | None],
        stream: tuple[Tensor, Tensor | None],
    ) -> TrialErrors:
        """rows: chunks of z [T, K], t [T, O] and each token's weight [T]; own: P and b₀, stream: S and b₁ (float32)."""
        found = torch.zeros(4, dtype=torch.float64, device=own[0].device)
        for z_TK, t_TO, weight_T in rows:
            scale_T1 = weight_T.sqrt()[:, None]
            u_TO = (t_TO - torch.nn.functional.linear(z_TK, *own)) * scale_T1
            v_TO = torch.nn.functional.linear(z_TK, *stream) * scale_T1
            pairs = (t_TO * scale_T1,) * 2, (u_TO, u_TO), (u_TO, v_TO), (v_TO, v_TO)
            found += torch.stack([torch.sum(a * b, dtype=torch.float64) for a, b in pairs])
        return cls(*found.tolist())

    def sum_over(self, group: Group) -> TrialErrors:
        """Those of all processes, the same on each."""
        numbers = torch.tensor([self.total, self.own, self.mixed, self.stream], dtype=torch.float64)
        return TrialErrors(*group.sum_(numbers).tolist())

    @property
    def best_alpha(self) -> float:
        """The α in 0..1 of the least error; 0 where that gains nothing but rounding."""
        if not self.stream > 0 or self.mixed <= 0 or self.mixed**2 <= NOTHING * self.own * self.stream:
            return 0.0
        return min(self.mixed / self.stream, 1.0)

    def at(self, alpha: float) -> float:
        """The error at an α, as a share of Σ ‖t‖²."""
        error = self.own - 2 * alpha * self.mixed + alpha**2 * self.stream
        return max(error / self.total, 0.0) if self.total > 0 else 0.0
