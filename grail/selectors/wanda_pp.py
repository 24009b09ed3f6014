"""wanda-pp-sp: Wanda's score plus the gradient of the block's own output norm; REFERENCE section 1.

Wanda++ (Yang et al., "Wanda++: Pruning Large Language Models via Regional Gradients", 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import GrailError
from ..statistics import DIAGONAL
from .base import BLOCK_GRADIENTS, RegionalOptions, ScoreSelector, SiteView


@dataclass
class WandaPlusPlus(ScoreSelector):
    """score_j = mean_i (α Γ_ij + ‖X_j‖) |W_ij|

    Γ: RMS over calibration windows X of ∂‖f(X)‖₂/∂W, the norm over all positions and channels, not divided by their
    number; ‖X_j‖ = sqrt(G_jj / windows), the channel's norm over one window, as in the public code. Both grow alike
    with the window's length, so that α means the same at any length. Then, unless regional=none, the narrow block is
    trained towards the dense block's output after compensation (grail/regional.py).
    """

    alpha: float = 100.0
    regional: str = "after"
    passes: int = 5
    windows: int = 32
    learning_rate: float = 3e-7

    name = "wanda-pp-sp"
    summary = "wanda-sp plus regional gradients, then regional optimisation of the compressed block"
    source = "Wanda++ (Yang et al., 2025), structured as in GRAIL (Tang et al., CPAL 2026)"
    needs = frozenset({DIAGONAL, BLOCK_GRADIENTS})

    def __post_init__(self):
        if self.regional not in ("after", "none"):
            raise GrailError(f"--set regional={self.regional}: choose after or none")
        for option in ("alpha", "passes", "windows", "learning_rate"):
            if not getattr(self, option) >= 0:
                raise GrailError(f"--set {option}={getattr(self, option)}: must be 0 or more")

    def scores(self, site: SiteView) -> Tensor:
        norm_H = (site.statistics.mean_square() * site.statistics.count / site.windows).sqrt()
        return ((self.alpha * site.gradients_OH.double() + norm_H) * site.weight_OH.double().abs()).mean(0)

    def regional_options(self) -> RegionalOptions | None:
        if self.regional == "none" or not (self.passes and self.windows):
            return None
        return RegionalOptions(self.passes, self.windows, self.learning_rate)
