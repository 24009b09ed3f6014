"""flap: channels whose output hardly fluctuates are replaced by a bias; REFERENCE section 1.

FLAP (An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import GrailError
from ..statistics import DIAGONAL, MOMENTS
from .base import ScoreSelector, SiteView, column_sums

METRICS = ("WIFV", "IFV", "WIFN")
STRUCTURES = {"AL-AM": "global", "AL-MM": "global", "UL-UM": "uniform", "UL-MM": "uniform"}


@dataclass
class Flap(ScoreSelector):
    """WIFV: σ²_j ‖W_:j‖²; IFV: σ²_j; WIFN: mean_i |W_ij| · RMS_j; of heads the square.

    AL: z-scores per layer, mean over a head's channels, one threshold over the network; UL: sums, the same ratio in
    every layer. MM: `remove_heads` heads of the whole network go, channels make up the rest of the budget.
    """

    metric: str = "WIFV"
    structure: str = "AL-AM"
    remove_heads: int = -1

    name = "flap"
    summary = "variance of the channel's activation times the squared norm of the consumer's column; fits a bias"
    source = "FLAP (An et al., AAAI 2024)"
    needs = frozenset({MOMENTS, DIAGONAL})
    allocation = "global"
    bias = True

    def __post_init__(self):
        if self.metric not in METRICS:
            raise GrailError(f"--set metric={self.metric}: choose one of {', '.join(METRICS)}")
        if self.structure not in STRUCTURES:
            raise GrailError(f"--set structure={self.structure}: choose one of {', '.join(STRUCTURES)}")
        fixed = self.structure.endswith("MM")
        if fixed != (self.remove_heads >= 0):
            needed = "needs" if fixed else "has no use for"
            raise GrailError(f"--set structure={self.structure} {needed} --set remove_heads=N")

    def own_allocation(self) -> str:
        return STRUCTURES[self.structure]

    def fixed_heads(self) -> int | None:
        return self.remove_heads if self.structure.endswith("MM") else None

    def scores(self, site: SiteView) -> Tensor:
        weight_OH, statistics = site.weight_OH, site.statistics
        if self.metric == "WIFN":
            scores_H = column_sums(weight_OH, torch.abs) / len(weight_OH) * statistics.mean_square().sqrt()
        else:
            scores_H = statistics.variance()
            if self.metric == "WIFV":
                scores_H = scores_H * column_sums(weight_OH, torch.square)
        return scores_H.square() if site.kind == "heads" else scores_H
