"""Reductions R (K x H) of a hidden vector and their plain lifts B0 (H x K); DESIGN section 1.

Shapes: H width, K kept, Q rows that R cannot reproduce, O outputs of the consumer, U units; R, M some of their rows.

A selection keeps some units (heads, or single channels); a folding averages clusters of channels. Both are stored as
index vectors and applied by indexing: R and B0 are never formed. What they make of a Gram matrix comes whole or by rows
`start`..`end`, so that nobody has to hold it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grail_kernels import PackedSymmetric

FOLD_ROWS = 512
"""Rows of a Gram matrix that are folded at once."""


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
        # of two axes, or of whole units: five to twenty times faster on a CPU than hidden[..., index]
        shape = (-1, self.width) if self.size == 1 else (-1, self.width // self.size, self.size)
        rows = hidden.reshape(shape)
        return rows.index_select(1, self.kept.to(hidden.device)).reshape(*hidden.shape[:-1], self.kept_width)

    def narrow_producer(self, rows: Tensor, rows_per_unit: int) -> Tensor:
        """A producer's rows (weight [U * rows_per_unit, ...] or bias) of the kept units."""
        return rows[expand(self.kept, rows_per_unit).to(rows.device)]

    def lift_consumer(self, weight_OH: Tensor) -> Tensor:
        """W B0 [O, K]: what classic pruning writes."""
        return weight_OH.index_select(1, self.channels.to(weight_OH.device))

    def expand_consumer(self, weight_OK: Tensor) -> Tensor:
        """W' R [O, H]: the narrow consumer seen from the full hidden vector."""
        wide_OH = weight_OK.new_zeros(weight_OK.shape[0], self.width)
        return wide_OH.scatter_(1, self.channels.to(weight_OK.device).expand_as(weight_OK), weight_OK)

    def cross(self, gram: PackedSymmetric, start: int = 0, end: int | None = None) -> Tensor:
        """G Rᵀ [H, K], or some of its rows."""
        return gram.gather(torch.arange(self.width)[start:end], self.channels)

    def normal_matrix(self, gram: PackedSymmetric, start: int = 0, end: int | None = None) -> Tensor:
        """A = R G Rᵀ [K, K], or some of its rows."""
        return gram.gather(self.channels[start:end], self.channels)

    def normal_diagonal(self, gram: PackedSymmetric) -> Tensor:
        """diag A, float64 [K]."""
        return gram.diagonal()[self.channels.to(gram.device)].double()

    @property
    def residual_rows(self) -> int:
        """Q."""
        return self.width - self.kept_width

    @property
    def residual_parts(self) -> int:
        """What `start` and `end` of `residual` count: removed channels."""
        return self.residual_rows

    def residual(self, gram: PackedSymmetric, start: int = 0, end: int | None = None) -> tuple[Tensor, Tensor]:
        """(rows int64 [Q], block [Q, K]): the rows of G Rᵀ - B0 A that are not zero by construction, or some."""
        removed = self.removed_channels[start:end]
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

    def cross(self, gram: PackedSymmetric, start: int = 0, end: int | None = None) -> Tensor:
        """G Rᵀ [H, K], or some of its rows, float64."""
        return self._cross(gram, torch.arange(self.width)[start:end])

    def normal_matrix(self, gram: PackedSymmetric, start: int = 0, end: int | None = None) -> Tensor:
        """A = R G Rᵀ [K, K], or some of its rows, float64."""
        return self._members(gram, start, end)[3]

    def normal_diagonal(self, gram: PackedSymmetric) -> Tensor:
        """diag A, float64 [K]."""
        starts = range(0, self.kept_width, FOLD_ROWS)
        return torch.cat([self.normal_matrix(gram, s, s + FOLD_ROWS)[:, s:].diagonal() for s in starts])

    @property
    def residual_rows(self) -> int:
        """Q = H: none is zero by construction."""
        return self.width

    @property
    def residual_parts(self) -> int:
        """What `start` and `end` of `residual` count: clusters."""
        return self.kept_width

    def residual(self, gram: PackedSymmetric, start: int = 0, end: int | None = None) -> tuple[Tensor, Tensor]:
        """(rows int64 [H], block [H, K]): G Rᵀ - B0 A, or those of its rows that are members of some clusters."""
        members_M, local_M, cross_MK, normal_RK = self._members(gram, start, end)
        return members_M, cross_MK.sub_(normal_RK[local_M])

    def _members(self, gram: PackedSymmetric, start: int, end: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of clusters start..end: members int64 [M] and whose they are (0 for `start`), the members' rows of G Rᵀ
        [M, K] and the clusters' rows of A [R, K]."""
        sizes_R = self.sizes[start:end]
        members_M = ((self.cluster >= start) & (self.cluster < start + len(sizes_R))).nonzero()[:, 0]
        cross_MK = self._cross(gram, members_M)
        local_M = (self.cluster[members_M] - start).to(cross_MK.device)
        normal_RK = cross_MK.new_zeros(len(sizes_R), self.kept_width).index_add_(0, local_M, cross_MK)
        return members_M, local_M, cross_MK, normal_RK.div_(sizes_R.to(cross_MK)[:, None])

    def _cross(self, gram: PackedSymmetric, rows_M: Tensor) -> Tensor:
        """These rows of G Rᵀ, float64 [M, K]."""
        everything, cluster = torch.arange(self.width), self.cluster.to(gram.device)
        cross_MK = torch.empty(len(rows_M), self.kept_width, dtype=torch.float64, device=gram.device)
        for part, out in zip(rows_M.split(FOLD_ROWS), cross_MK.split(FOLD_ROWS), strict=True):
            block_HP = gram.gather(everything, part).double()
            total_KP = block_HP.new_zeros(self.kept_width, len(part)).index_add_(0, cluster, block_HP)
            out.copy_(total_KP.mT).div_(self.sizes.to(out))
        return cross_MK


Reduction = Selection | Folding
