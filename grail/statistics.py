"""What is gathered about a site's hidden vector while calibration data streams through it.

Shapes: T rows, H width. A selector and the compensation declare what they need; only that is accumulated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grail_kernels import GramAccumulator, PackedSymmetric

from .errors import GrailError

DIAGONAL = "diag"
GRAM = "gram"


class SiteStatistics:
    """Streaming statistics of x [..., H]: the sum of squares per channel (float64), or the whole Gram matrix."""

    def __init__(self, width: int, needs: frozenset[str], *, device=None):
        unknown = needs - {DIAGONAL, GRAM}
        if unknown:
            raise ValueError(f"unknown statistics {sorted(unknown)}")
        self.width = width
        self.count = 0
        self._gram = GramAccumulator(width, device=device) if GRAM in needs else None
        self._square_sum = torch.zeros(width, dtype=torch.float64, device=device) if needs == {DIAGONAL} else None

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the rows of x [..., H]; mask [...] True = the row counts. Raises ValueError on unfitting shapes."""
        if x.dim() < 1 or x.shape[-1] != self.width or (mask is not None and mask.shape != x.shape[:-1]):
            raise ValueError(f"rows {tuple(x.shape)} and mask do not fit a width of {self.width}")
        rows_TH = x.reshape(-1, self.width) if mask is None else x[mask.bool()]
        self.count += rows_TH.shape[0]
        if self._gram is not None:
            self._gram.update(rows_TH)
        elif self._square_sum is not None:
            self._square_sum += rows_TH.float().square().sum(0)

    @property
    def gram(self) -> PackedSymmetric:
        """G = XᵀX, packed float32."""
        if self._gram is None:
            raise LookupError("the Gram matrix was not asked for: add 'gram' to the selector's needs")
        return self._gram.packed

    def mean_square(self) -> Tensor:
        """E[x²] per channel, float64 [H]."""
        total_H = self._gram.diagonal().double() if self._gram is not None else self._square_sum
        if total_H is None:
            raise LookupError("the diagonal was not asked for: add 'diag' to the selector's needs")
        return total_H / max(self.count, 1)

    def check_finite(self, name: str) -> None:
        """Raise GrailError naming the site when an activation was NaN or too large for its dtype."""
        bad = (~torch.isfinite(self.mean_square())).nonzero()[:, 0].tolist()
        if bad:
            raise GrailError(
                f"{name}: {len(bad)} of {self.width} channels carry NaN or infinite activations (first: channel "
                f"{bad[0]}); check the checkpoint, or use --dtype float32 where a narrower one overflows"
            )
