"""slimgpt: greedy removal with optimal-brain-surgeon updates of what remains; REFERENCE section 1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import GrailError
from ..reduction import Selection
from ..statistics import GRAM
from .base import Selector, SiteView, keep_best, standardised
from .elimination import Elimination, damped_inverse, greedy

BATCHES = 32


@dataclass
class SlimGPT(Selector):
    """Cost of a unit g: tr(W_g ([H⁻¹]_gg)⁻¹ W_gᵀ), for a channel ‖W_:j‖² / [H⁻¹]_jj, with W and H⁻¹ as the units
    already removed have left them; H = G + damping · mean(diag G) · I.

    damping: as above. greedy: false ranks once by the costs of the dense layer. batch: units removed between two
    rankings; 0 means 1 for heads and a 32nd of the channels to be removed, at least 1. obs: write the updated weights
    even without compensation; they equal the anchored solution at λ = damping · mean(diag G), so that is what is
    solved, from the original weight (REFERENCE section 1).
    Memory: H⁻¹ dense in float64, 8 H² bytes, about five times that while it is computed; W in float64.
    """

    name = "slimgpt"
    summary = "greedy removal by output error, with updates of the remaining weights and of the inverse Hessian"
    source = "SlimGPT (Ling et al., NeurIPS 2024)"
    needs = frozenset({GRAM})
    allocation = "log"

    damping: float = 0.01
    greedy: bool = True
    batch: int = 0
    obs: bool = False

    def __post_init__(self):
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise GrailError(f"--set damping={self.damping}: expected a number that is not negative")
        if self.batch < 0:
            raise GrailError(f"--set batch={self.batch}: expected a number of units, or 0 for the rule")

    def select(self, site: SiteView) -> Selection:
        """Raises GrailError naming the site when H or a block of H⁻¹ is singular."""
        units = site.units
        moves = units.per_group - site.kept
        if moves == 0:
            return Selection(torch.arange(units.count), units.size, units.width)
        work = self._elimination(site)
        if not self.greedy:
            return keep_best(work.costs().repeat_interleave(units.size), units, site.kept)
        rule = math.ceil(moves / BATCHES) if site.kind == "channels" else 1
        greedy(work, units.groups, moves, batch=self.batch or rule)
        return Selection(work.alive.nonzero()[:, 0].cpu(), units.size, units.width)

    def global_scores(self, site: SiteView) -> Tensor:
        """z-scores over the site's units of their costs in the dense layer."""
        return standardised(self._elimination(site).costs())

    def updates_weights(self) -> bool:
        return self.obs

    def own_ridge(self, site: SiteView) -> float | None:
        if not self.obs:
            return None
        return self.damping * site.matrix.diagonal().double().mean().item()

    def _elimination(self, site: SiteView) -> Elimination:
        inverse_HH = damped_inverse(site.matrix, self.damping, site.name, site.note)
        return Elimination(inverse_HH, site.weight_OH, site.units.size, site.name)
