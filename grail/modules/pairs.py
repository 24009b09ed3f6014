"""What a compressed hidden vector tells of the one it stands for. Shapes: H width, K kept, O outputs as in narrow.py.

t [H] is the target, z [K] what the compressed producers emit, d = t − B0 z; a consumer W reads t, its repair W' = W B
reads z, with B = B0 + Σ d zᵀ (A + λI)⁻¹, A = Σ z zᵀ (DESIGN section 1, general form).
"""

from __future__ import annotations

import torch
from torch import Tensor

from grail_kernels import GramAccumulator

from ..compensation import Compensation, compensate_pairs
from ..moments import PairStatistics
from ..normal_equations import share_of
from ..reduction import Reduction


class HiddenPairs:
    """Streaming moments of z, t and d; with `affine` about their means."""

    def __init__(self, reduction: Reduction, *, device: torch.device, affine: bool):
        self.lift_HK = reduction.lift_consumer(torch.eye(reduction.width, device=device))
        self._pairs = PairStatistics(reduction.kept_width, reduction.width, device=device, affine=affine)
        self._target = GramAccumulator(reduction.width, device=device, centred=affine)
        self._difference = GramAccumulator(reduction.width, device=device, centred=affine)

    def update(self, z: Tensor, target: Tensor) -> None:
        """Add rows: z [..., K] and t [..., H]."""
        target = target.float()
        difference = target - z.float() @ self.lift_HK.mT
        self._pairs.update(z, target, difference)
        self._target.update(target.reshape(-1, target.shape[-1]))
        self._difference.update(difference.reshape(-1, difference.shape[-1]))

    @property
    def count(self) -> int:
        """Rows so far."""
        return self._pairs.count

    def repair(self, weight_OH: Tensor, *, ridge: float, form: str, name: str) -> Compensation:
        """W' [O, K] float64 and the errors Σ‖W t − W' z‖² / Σ‖W t‖² of W B0 and of W', with `affine` both sums about
        their means. Raises GrailError naming the site where no λ makes the system solvable."""
        found = compensate_pairs(self.lift_HK.double(), self._pairs, ridge=ridge, form=form, name=name)
        found.error_before, found.error_after = self._errors(weight_OH.double(), found.weight)
        found.weight, found.bias = weight_OH.double() @ found.weight, None
        return found

    def error(self, weight_OH: Tensor) -> float:
        """That of W B0 alone."""
        return self._errors(weight_OH.double(), self.lift_HK.double())[0]

    def _errors(self, weight_OH: Tensor, map_HK: Tensor) -> tuple[float, float]:
        total = self._target.packed.quadratic_trace(weight_OH)
        before = self._difference.packed.quadratic_trace(weight_OH)
        change_OK = weight_OH @ (map_HK - self.lift_HK.double())
        cross_KO = self._pairs.cross.double() @ weight_OH.mT
        after = before - 2 * torch.sum(change_OK.mT * cross_KO).item() + self._pairs.normal.quadratic_trace(change_OK)
        return share_of(before, total), share_of(after, total)
