"""wanda-sp: weight magnitude times activation size, summed per structure; REFERENCE section 1."""

from torch import Tensor

from ..statistics import DIAGONAL
from .base import ScoreSelector, SiteView


class WandaSP(ScoreSelector):
    """score_j = mean_i |W_ij| · RMS_j, RMS_j = sqrt(G_jj / N)"""

    name = "wanda-sp"
    summary = "mean |weight| of the consumer's column times the channel's RMS activation"
    source = "Wanda (Sun et al., ICLR 2024), structured as in FLAP (An et al., AAAI 2024)"
    needs = frozenset({DIAGONAL})

    def scores(self, site: SiteView) -> Tensor:
        return site.weight_OH.double().abs().mean(0) * site.statistics.mean_square().sqrt()
