"""What is gathered about a site's hidden vector while calibration data streams through it.

Shapes: T rows, H width. A selector and the compensation declare what they need; only that is accumulated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grail_kernels import GramAccumulator, PackedSymmetric

from .errors import GrailError

if TYPE_CHECKING:
    from .distributed import Group

DIAGONAL = "diag"
MOMENTS = "moments"
GRAM = "gram"
KNOWN = frozenset({DIAGONAL, MOMENTS, GRAM})


class SiteStatistics:
    """Streaming statistics of x [..., H]: per channel the mean and the squares about it (float64), or the whole Gram
    matrix; `affine` keeps the Gram matrix about the mean, for a repair that fits a bias."""

    def __init__(self, width: int, needs: frozenset[str], *, device=None, affine: bool = False):
        if needs - KNOWN:
            raise ValueError(f"unknown statistics {sorted(needs - KNOWN)}")
        self.width, self.needs = width, needs
        self.count = 0
        centred = affine or MOMENTS in needs
        self._gram = GramAccumulator(width, device=device, centred=centred) if GRAM in needs else None
        self._mean = torch.zeros(width, dtype=torch.float64, device=device)
        self._squares = torch.zeros(width, dtype=torch.float64, device=device)

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the rows of x [..., H]; mask [...] True = the row counts. Raises ValueError on unfitting shapes."""
        if x.dim() < 1 or x.shape[-1] != self.width or (mask is not None and mask.shape != x.shape[:-1]):
            raise ValueError(f"rows {tuple(x.shape)} and mask do not fit a width of {self.width}")
        rows_TH = x.reshape(-1, self.width) if mask is None else x[mask.bool()]
        if not len(rows_TH):
            return
        if self._gram is not None:
            self._gram.update(rows_TH)
        elif self.needs:
            rows_TH = rows_TH.double()
            mean_H = rows_TH.mean(0)
            self._merge(len(rows_TH), mean_H, (rows_TH - mean_H).square().sum(0))
        self.count += len(rows_TH)

    def _merge(self, count: int, mean_H: Tensor, squares_H: Tensor) -> None:
        """Chan, Golub and LeVeque's update of the mean and the squares about it: nothing cancels."""
        delta_H = mean_H - self._mean
        share = count / (self.count + count)
        self._mean += delta_H * share
        self._squares += squares_H + delta_H.square() * (self.count * share)

    def sum_over(self, group: Group) -> None:
        """Let these be the statistics of the rows of all processes, of which some may have none; the same bits on each.
        Raises GrailError when another process is gone."""
        if group.size == 1:
            return
        if self._gram is not None:
            with group.collective(self._gram.device) as carrier:
                self._gram.all_reduce(carrier)
            self.count = self._gram.count
            return
        gathered = group.stack(torch.cat([self._mean.new_tensor([self.count]), self._mean, self._squares]))
        self.count, self._mean, self._squares = 0, torch.zeros_like(self._mean), torch.zeros_like(self._squares)
        for part in gathered:
            count = int(part[0])
            if count:
                self._merge(count, *part[1:].split(self.width))
                self.count += count

    @property
    def accumulator(self) -> GramAccumulator:
        """What other moments of the same rows go with (moments.CrossMoments)."""
        self._require_gram()
        return self._gram

    @property
    def gram(self) -> PackedSymmetric:
        """G = XᵀX, packed float32; where the matrix is kept about the mean a copy, made anew each time."""
        self._require_gram()
        return self._gram.raw_packed()

    @property
    def scatter(self) -> PackedSymmetric:
        """Σ (x − μ)(x − μ)ᵀ, packed float32: n times the covariance."""
        self._require_gram()
        if not self._gram.centred:
            raise LookupError("the scatter about the mean was not asked for: add 'moments', or set affine")
        return self._gram.packed

    def mean(self) -> Tensor:
        """E[x] per channel, float64 [H]."""
        return self._gram.mean if self._gram is not None else self._moment(self._mean)

    def variance(self) -> Tensor:
        """Unbiased variance per channel (divided by N - 1), float64 [H]; 0 for a single row."""
        squares_H = self.scatter.diagonal().double() if self._gram is not None else self._moment(self._squares)
        return squares_H / max(self.count - 1, 1)

    def mean_square(self) -> Tensor:
        """E[x²] per channel, float64 [H]."""
        if self._gram is not None:
            squares_H = self._gram.diagonal().double() / max(self.count, 1)
            return squares_H + self._gram.mean.square() if self._gram.centred else squares_H
        return self._moment(self._squares) / max(self.count, 1) + self._mean.square()

    def check_finite(self, name: str, wider: str = "use --dtype float32") -> None:
        """Raise GrailError naming the site when an activation was NaN or too large for its dtype; wider: what to do
        about that."""
        bad = (~torch.isfinite(self.mean_square())).nonzero()[:, 0].tolist()
        if bad:
            raise GrailError(
                f"{name}: {len(bad)} of {self.width} channels carry NaN or infinite activations (first: channel "
                f"{bad[0]}); check the checkpoint, or {wider} where a narrower one overflows"
            )

    def _moment(self, value_H: Tensor) -> Tensor:
        if not self.needs:
            raise LookupError("no statistics were asked for: add 'diag' or 'moments' to the selector's needs")
        return value_H

    def _require_gram(self) -> None:
        if self._gram is None:
            raise LookupError("the Gram matrix was not asked for: add 'gram' to the selector's needs")
