"""Reductions R (K x H) of a hidden vector and their plain lifts B0 (H x K); DESIGN section 1.

Shapes: H width, K kept, Q rows that R cannot reproduce, O outputs of the consumer, U units.

A selection keeps some units (heads, or single channels); a folding averages clusters of channels. Both are stored as
index vectors and applied by indexing: R and B0 are never formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grail_kernels import PackedSymmetric


@dataclass(frozen=True)
class Units:
    """How a site's channels divide: `groups` of `per_group` units of `size` channels, in this order.

    As many units are removed from each group (one group unless query heads share key/value heads).
    """

    groups: int
    per_group: int
    size: int

    @property
    def count(self) -> int:
        return self.groups * self.per_group

    @property
    def width(self) -> int:
        return self.count * self.size


def expand(units: Tensor, size: int) -> Tensor:
    """Channel indices of units of `size` consecutive channels, int64 [len(units) * size]."""
    return (units[:, None] * size + torch.arange(size)).flatten()


@dataclass(frozen=True, eq=False)
class Selection:
    """Keep some units. kept: int64 [k] ascending unit numbers; size: channels per unit; width: H."""

    kept: Tensor
    size: int
    width: int

    def __post_init__(self):
        total = self.width // self.size
        kept = self.kept
        if not len(kept) or kept.min() < 0 or kept.max() >= total or (kept.diff() <= 0).any():
            raise ValueError(f"kept units must be ascending, distinct and within 0..{total - 1}: {kept.tolist()}")

    @property
    def channels(self) -> Tensor:
        """Kept channels, int64 [K]."""
        return expand(self.kept, self.size)

    @property
    def removed_channels(self) -> Tensor:
        """Removed channels, int64 [H - K]."""
        gone = torch.ones(self.width, dtype=torch.bool)
        gone[self.channels] = False
        return gone.nonzero()[:, 0]

    @property
    def kept_width(self) -> int:
        return len(self.kept) * self.size

    @property
    def is_identity(self) -> bool:
        return self.kept_width == self.width

    def reduce(self, hidden: Tensor) -> Tensor:
        """R h over the last axis: [..., H] -> [..., K]."""
        return hidden[..., self.channels.to(hidden.device)]

    def narrow_producer(self, rows: Tensor, rows_per_unit: int) -> Tensor:
        """A producer's rows (weight [U * rows_per_unit, ...] or bias) of the kept units."""
        return rows[expand(self.kept, rows_per_unit).to(rows.device)]

    def lift_consumer(self, weight_OH: Tensor) -> Tensor:
        """W B0 [O, K]: what classic pruning writes."""
        return weight_OH[:, self.channels.to(weight_OH.device)]

    def expand_consumer(self, weight_OK: Tensor) -> Tensor:
        """W' R [O, H]: the narrow consumer seen from the full hidden vector."""
        wide_OH = weight_OK.new_zeros(weight_OK.shape[0], self.width)
        wide_OH[:, self.channels.to(weight_OK.device)] = weight_OK
        return wide_OH

    def normal_matrix(self, gram: PackedSymmetric) -> Tensor:
        """A = R G Rᵀ [K, K]."""
        return gram.gather(self.channels, self.channels)

    def residual(self, gram: PackedSymmetric) -> tuple[Tensor, Tensor]:
        """(rows int64 [Q], block [Q, K]): the rows of G Rᵀ - B0 A that are not zero by construction."""
        removed = self.removed_channels
        return removed, gram.gather(removed, self.channels)


@dataclass(frozen=True, eq=False)
class Folding:
    """Average clusters of channels. cluster: int64 [H], the number 0..K-1 of each channel's cluster, none empty."""

    cluster: Tensor

    def __post_init__(self):
        if self.cluster.min() < 0 or (self.sizes == 0).any():
            raise ValueError("a folding needs clusters 0..K-1, each with at least one channel")

    @property
    def width(self) -> int:
        return len(self.cluster)

    @property
    def sizes(self) -> Tensor:
        """Channels per cluster, int64 [K]."""
        return torch.bincount(self.cluster)

    @property
    def kept_width(self) -> int:
        return int(self.cluster.max()) + 1

    @property
    def is_identity(self) -> bool:
        return torch.equal(self.cluster, torch.arange(self.width))

    def reduce(self, hidden: Tensor) -> Tensor:
        """R h over the last axis: the mean of each cluster, [..., H] -> [..., K]."""
        total = hidden.new_zeros(*hidden.shape[:-1], self.kept_width)
        return total.index_add_(-1, self.cluster.to(hidden.device), hidden) / self.sizes.to(hidden)

    def narrow_producer(self, rows: Tensor, rows_per_unit: int) -> Tensor:
        """Mean of each cluster's rows, in at least float32, back in the rows' dtype."""
        if rows_per_unit != 1:
            raise ValueError("folding averages single channels; heads are selected, not folded")
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return self.reduce(wide.movedim(0, -1)).movedim(-1, 0).to(rows.dtype).contiguous()

    def lift_consumer(self, weight_OH: Tensor) -> Tensor:
        """W B0 [O, K]: the columns of each cluster summed."""
        total_OK = weight_OH.new_zeros(weight_OH.shape[0], self.kept_width)
        return total_OK.index_add_(1, self.cluster.to(weight_OH.device), weight_OH)

    def expand_consumer(self, weight_OK: Tensor) -> Tensor:
        """W' R [O, H]."""
        return (weight_OK / self.sizes.to(weight_OK))[:, self.cluster.to(weight_OK.device)]

    def normal_matrix(self, gram: PackedSymmetric) -> Tensor:
        """A = R G Rᵀ [K, K]."""
        return self.reduce(self._cross(gram).mT.contiguous())

    def residual(self, gram: PackedSymmetric) -> tuple[Tensor, Tensor]:
        """(rows int64 [H], block [H, K]): G Rᵀ - B0 A."""
        cross_HK = self._cross(gram)
        normal_KK = self.reduce(cross_HK.mT.contiguous())
        return torch.arange(self.width), cross_HK - normal_KK[self.cluster.to(cross_HK.device)]

    def _cross(self, gram: PackedSymmetric) -> Tensor:
        """G Rᵀ [H, K], by column blocks so that G is never whole, in float64."""
        everything = torch.arange(self.width)
        cross_HK = torch.zeros(self.width, self.kept_width, dtype=torch.float64, device=gram.device)
        for start, end in gram.bounds:
            block_HC = gram.gather(everything, everything[start:end]).double()
            cross_HK.index_add_(1, self.cluster[start:end].to(gram.device), block_HC)
        return cross_HK / self.sizes.to(cross_HK)


Reduction = Selection | Folding
