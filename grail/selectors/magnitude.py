"""mag-sp: keep the channels whose consumer columns are longest. Data-free; REFERENCE section 1."""

import torch
from torch import Tensor

from .base import ScoreSelector, SiteView, column_sums


class Magnitude(ScoreSelector):
    """score_j = ‖W_:j‖₂"""

    name = "mag-sp"
    summary = "column norm of the consumer's weight; needs no data"
    source = "structured magnitude pruning, as in GRAIL (Tang et al., CPAL 2026)"

    def scores(self, site: SiteView) -> Tensor:
        return column_sums(site.weight_OH, torch.square).sqrt()
