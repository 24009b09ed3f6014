"""random: the control every method has to beat."""

import torch
from torch import Tensor

from .base import ScoreSelector, SiteView


class Random(ScoreSelector):
    """Uniform scores per unit from (seed, site name): the same units whatever else runs, on every machine."""

    name = "random"
    summary = "seeded random units: the control"
    source = "control"

    def scores(self, site: SiteView) -> Tensor:
        units = site.units
        per_unit = torch.rand(units.count, dtype=torch.float64, generator=site.generator())
        return per_unit.repeat_interleave(units.size).to(site.weight_OH.device)
