"""Statistics of pairs: a hidden vector, and what its consumer should make of it.

Shapes: K width of the hidden vector z, O outputs of the consumer, T rows, B some outputs. y (O) is the target output,
d what some given weight gets wrong about it. Accumulating the difference means that equal inputs give exactly zero
(DESIGN section 1, general form).
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from grail_kernels import CrossAccumulator, GramAccumulator, PackedSymmetric

from .normal_equations import blocks

if TYPE_CHECKING:
    from .distributed import Group


def dot(a_TO: Tensor, b_TO: Tensor, *, exact: bool = False) -> float:
    """Σ a·b of float32 rows: in float32 along a row, in float64 over the rows. exact: all in float64, which takes
    a hundred times as long, for sums from which those of the means are taken off; so too where float32 overflows."""
    found = math.nan if exact else torch.linalg.vecdot(a_TO, b_TO).sum(dtype=torch.float64).item()
    return found if math.isfinite(found) else torch.sum(a_TO.double() * b_TO.double()).item()


class CrossMoments:
    """Streaming C = Σ z dᵀ, Σ‖y‖² and Σ‖d‖² beside the Gram matrix of z, which `gram` is and somebody else updates
    first; with `affine` all of them about the means."""

    def __init__(self, gram: GramAccumulator, outputs: int, *, affine: bool = False):
        self.affine = affine
        self.count = 0
        self._gram = gram
        self._cross = CrossAccumulator(gram.width, outputs, device=gram.device)
        self._origin: Tensor | None = None
        self._difference = torch.zeros(outputs, dtype=torch.float64, device=gram.device)
        self._target = torch.zeros(outputs, dtype=torch.float64, device=gram.device)
        self._difference_energy = self._target_energy = 0.0

    def update(self, z: Tensor, target: Tensor, difference: Tensor | None = None) -> None:
        """Add rows that the Gram matrix holds already: z [..., K], y [..., O] and d [..., O], without which it is y."""
        d = target if difference is None else difference
        z_TK, y_TO, d_TO = (t.reshape(-1, t.shape[-1]).float() for t in (z, target, d))
        if not len(z_TK):
            return
        self.count += len(z_TK)
        if self.affine:
            if self._origin is None:
                self._origin = self._gram.mean.float()
            self._difference += d_TO.sum(0, dtype=torch.float64)
            self._target += y_TO.sum(0, dtype=torch.float64)
        self._cross.update(z_TK if self._origin is None else z_TK - self._origin, d_TO)
        self._difference_energy += dot(d_TO, d_TO, exact=self.affine)
        self._target_energy += dot(y_TO, y_TO, exact=self.affine)

    def minus_(self, weight_OK: Tensor, gram: PackedSymmetric) -> None:
        """Let d be d − W z from here on, of the rows so far: C − A Wᵀ in float64, instead of a product for each row.
        gram: A of the same rows (with `affine` about their mean), of all processes as these moments are."""
        energy = self.difference_energy
        for outputs in blocks(weight_OK):
            weight_BK = weight_OK[outputs].double()
            made_KB, cross_KB = gram.matmul(weight_BK.mT), self.columns(outputs).double()
            energy += torch.sum(weight_BK.mT * (made_KB - 2 * cross_KB)).item()
            cross_KB -= made_KB
            if self._origin is not None:
                self._difference[outputs] -= self.count * (weight_BK @ self._gram.mean)
                cross_KB += self._moved(outputs)
            self._cross.value[:, outputs] = cross_KB
        self._difference_energy = energy + self._about_mean(self._difference)

    def less(self, weight_OK: Tensor, gram: PackedSymmetric) -> Self:
        """A copy, with the same Gram matrix, of which `minus_` took W z."""
        found = copy.copy(self)
        found._cross, found._difference = copy.deepcopy(self._cross), self._difference.clone()
        found.minus_(weight_OK, gram)
        return found

    def sum_over(self, group: Group) -> None:
        """Let these be the statistics of the pairs of all processes, of which some may have none; the same bits on
        each. The Gram matrix has been summed before. Raises GrailError when another process is gone."""
        if group.size == 1:
            return
        own_O, numbers = self._difference, [self.count, self._difference_energy, self._target_energy]
        totals = group.sum_(torch.cat([own_O.new_tensor(numbers), own_O, self._target]))
        if self.affine and self._gram.count:
            self._move_origin(self._gram.mean.float(), own_O)
        with group.collective(self._gram.device) as carrier:
            self._cross.all_reduce(carrier)
        numbers, self._difference, self._target = totals.split([3, len(own_O), len(own_O)])
        self.count = int(numbers[0])
        self._difference_energy, self._target_energy = numbers[1:].tolist()

    def _move_origin(self, origin_K: Tensor, difference_O: Tensor) -> None:
        """Let the cross moment, of pairs whose d sum to `difference`, be that of z − origin."""
        old_K = torch.zeros_like(origin_K) if self._origin is None else self._origin
        self._cross.shifted_(old_K.double() - origin_K.double(), difference_O)
        self._origin = origin_K

    @property
    def cross(self) -> Tensor:
        """C [K, O]: float32, or float64 where it was moved to the means."""
        return self.columns(slice(None))

    def columns(self, outputs: slice) -> Tensor:
        """C for some outputs, [K, B]."""
        cross_KB = self._cross.value[:, outputs]
        return cross_KB if self._origin is None else cross_KB.double() - self._moved(outputs)

    def _moved(self, outputs: slice) -> Tensor:
        """What about the origin that was kept to is more than about the mean, float64 [K, B]."""
        return torch.outer(self._gram.mean - self._origin.double(), self._difference[outputs])

    @property
    def accumulator(self) -> GramAccumulator:
        """What other moments of the same z go with."""
        return self._gram

    @property
    def normal(self) -> PackedSymmetric:
        """A = Σ z zᵀ, packed float32."""
        return self._gram.packed

    @property
    def mean(self) -> Tensor:
        """Mean of z, float64 [K]."""
        return self._gram.mean

    @property
    def mean_difference(self) -> Tensor:
        """Mean of d, float64 [O]."""
        return self._difference / max(self.count, 1)

    @property
    def difference_energy(self) -> float:
        """Σ‖d‖², about the mean with `affine`."""
        return self._difference_energy - self._about_mean(self._difference)

    @property
    def target_energy(self) -> float:
        """Σ‖y‖², about the mean with `affine`."""
        return self._target_energy - self._about_mean(self._target)

    def _about_mean(self, sum_O: Tensor) -> float:
        return sum_O.square().sum().item() / max(self.count, 1) if self.affine else 0.0


class PairStatistics(CrossMoments):
    """The same with a Gram matrix of its own, A = Σ z zᵀ."""

    def __init__(self, width: int, outputs: int, *, device=None, affine: bool = False):
        super().__init__(GramAccumulator(width, device=device, centred=affine), outputs, affine=affine)

    def update(self, z: Tensor, target: Tensor, difference: Tensor) -> None:
        """Add rows: z [..., K], y [..., O] and d [..., O]."""
        self._gram.update(z.reshape(-1, z.shape[-1]).float())
        super().update(z, target, difference)

    def sum_over(self, group: Group) -> None:
        """As in CrossMoments, the Gram matrix included."""
        if group.size > 1:
            with group.collective(self._gram.device) as carrier:
                self._gram.all_reduce(carrier)
        super().sum_over(group)
