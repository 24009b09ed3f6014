"""gram: greedy selection on the exact objective of the repair; REFERENCE section 1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import GrailError
from ..reduction import Selection
from ..statistics import GRAM
from .base import Selector, SiteView, standardised
from .elimination import Elimination, damped_dense, damped_inverse, greedy

DIRECTIONS = ("backward", "forward")


@dataclass
class GramSelector(Selector):
    """Keep P so that tr(W (G − G_:P G_PP⁻¹ G_P:) Wᵀ), the output error of the best repair, stays small.

    With a bias in the repair (`site.affine`) G is the scatter about the mean. A head is all its channels at once.
    direction: "backward" removes, one unit at a time, the one that raises the objective least; "forward" adds the one
    that lowers it most (‖W E_:j‖² / E_jj, E the residual: a pivoted Cholesky factorisation that knows W). Both are
    exact at every step. damping: G + damping · mean(diag G) · I stands for G, so that dead channels, duplicates and
    fewer tokens than channels are no exception; grail_kernels raises it to what the rounding of G asks for.
    Memory: one dense float64 matrix, 8 H² bytes (backward: about five times that while G is inverted); W in float64.
    """

    name = "gram"
    summary = "greedy on the exact error that the repair will leave, from the Gram matrix"
    source = (
        "Gram-based selection, GRAIL (Tang et al., CPAL 2026); greedy column subset selection (Farahat et al., 2013)"
    )
    needs = frozenset({GRAM})

    direction: str = "backward"
    damping: float = 1e-6

    def __post_init__(self):
        if self.direction not in DIRECTIONS:
            raise GrailError(f"--set direction={self.direction}: expected one of {', '.join(DIRECTIONS)}")
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise GrailError(f"--set damping={self.damping}: expected a number that is not negative")

    def select(self, site: SiteView) -> Selection:
        """Raises GrailError naming the site when G holds a NaN or no damping makes it positive definite."""
        units, kept = site.units, site.kept
        if kept == units.per_group:
            return Selection(torch.arange(units.count), units.size, units.width)
        if self.direction == "backward":
            work = self._backward(site)
            greedy(work, units.groups, units.per_group - kept)
            chosen = work.alive.nonzero()[:, 0].cpu()
        else:
            chosen = torch.tensor(greedy(self._forward(site), units.groups, kept, largest=True)).sort().values
        return Selection(chosen, units.size, units.width)

    def global_scores(self, site: SiteView) -> Tensor:
        """z-scores over the site's units of the objective when that unit alone goes."""
        return standardised(self._backward(site).costs())

    def _backward(self, site: SiteView) -> Elimination:
        inverse_HH = damped_inverse(site.matrix, self.damping, site.name, site.note)
        return Elimination(inverse_HH, site.weight_OH, site.units.size, site.name)

    def _forward(self, site: SiteView) -> Elimination:
        residual_HH = damped_dense(site.matrix, self.damping, site.name, site.note)
        output_OH = site.weight_OH.to(residual_HH) @ residual_HH
        return Elimination(residual_HH, output_OH, site.units.size, site.name)
