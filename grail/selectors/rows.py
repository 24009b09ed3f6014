"""mag-l1, mag-l2: keep the units whose producers' rows are large. Data-free; REFERENCE section 1."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import PRODUCERS, ScoreSelector, SiteView


class RowMagnitude(ScoreSelector):
    """score = Σ over the rows that make a unit of Σ_d |w_d|^p, biases left out: its p-norm to the power p, which ranks
    alike and adds up over a head. Where a BatchNorm stands behind a producer, the rows are those it is fused into. Rows
    that several units share (grouped keys and values) rank nothing among them."""

    needs = frozenset({PRODUCERS})
    power: int

    def scores(self, site: SiteView) -> Tensor:
        units = site.units
        total_U = site.weight_OH.new_zeros(units.count, dtype=torch.float64)
        for name, rows in site.producers.items():
            if len(rows) % units.count:
                continue
            weight = rows[:, :-1] if name in site.biased else rows
            total_U += weight.double().abs().pow(self.power).sum(1).view(units.count, -1).sum(1).to(total_U.device)
        return (total_U / units.size).repeat_interleave(units.size)


class MagnitudeL1(RowMagnitude):
    """‖w‖₁ of the producers' rows."""

    name = "mag-l1"
    summary = "L1 norm of the rows that make a unit; needs no data"
    source = "Filter pruning (Li et al., ICLR 2017), as in GRAIL (Tang et al., CPAL 2026)"
    power = 1


class MagnitudeL2(RowMagnitude):
    """‖w‖₂ of the producers' rows."""

    name = "mag-l2"
    summary = "L2 norm of the rows that make a unit; needs no data"
    source = "Filter pruning (Li et al., ICLR 2017), as in GRAIL (Tang et al., CPAL 2026)"
    power = 2
