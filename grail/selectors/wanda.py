"""wanda-sp: weight magnitude times activation size, summed per structure; REFERENCE section 1."""

import torch
from torch import Tensor

from ..statistics import DIAGONAL
from .base import ScoreSelector, SiteView, column_sums


class WandaSP(ScoreSelector):
    """score_j = mean_i |W_ij| · RMS_j, RMS_j = sqrt(G_jj / N)"""

    name = "wanda-sp"
    summary = "mean |weight| of the consumer's column times the channel's RMS activation"
    source = "Wanda (Sun et al., ICLR 2024), structured as in FLAP (An et al., AAAI 2024)"
    needs = frozenset({DIAGONAL})

    def scores(self, site: SiteView) -> Tensor:
        mean_H = column_sums(site.weight_OH, torch.abs) / len(site.weight_OH)
        return mean_H * site.statistics.mean_square().sqrt()


class Wanda(WandaSP):
    """The same under the name it has for vision."""

    name = "wanda"
    summary = "another name of wanda-sp"
