"""Widths of a layer, and where the rows and columns of a narrow layer lie in a wide one.

A narrow linear layer is a wide one without some rows (producers, axis 0) or columns (consumers, axis 1). A `Move` says
which; read one way it puts the narrow tensor into zeros, read the other way it takes the narrow one out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..reduction import Reduction, Selection, expand
from .base import Site

ATTENTION, MLP = "self_attn", "mlp"
PRODUCERS = {"q_proj": ATTENTION, "k_proj": ATTENTION, "v_proj": ATTENTION, "gate_proj": MLP, "up_proj": MLP}
CONSUMERS = {"o_proj": ATTENTION, "down_proj": MLP}
LINEARS = PRODUCERS | CONSUMERS
"""Linear layers of a decoder layer, and the branch each lies in."""


@dataclass(frozen=True)
class LayerWidths:
    """Query heads, key/value heads and MLP channels of one layer."""

    heads: int
    kv_heads: int
    channels: int

    @property
    def shared(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    def shape(self, name: str, hidden: int, head_dim: int) -> tuple[int, int]:
        """Rows and columns of a linear layer of LINEARS."""
        widths = {"q_proj": self.heads * head_dim, "k_proj": self.kv_heads * head_dim, "gate_proj": self.channels}
        widths |= {"v_proj": widths["k_proj"], "up_proj": self.channels}
        if name in PRODUCERS:
            return widths[name], hidden
        return hidden, widths["q_proj" if name == "o_proj" else "up_proj"]

    @staticmethod
    def largest(layers: Iterable[LayerWidths]) -> LayerWidths:
        """Widths that hold every layer with its query heads in their key/value groups."""
        layers = list(layers)
        kv_heads = max(w.kv_heads for w in layers)
        return LayerWidths(kv_heads * max(w.shared for w in layers), kv_heads, max(w.channels for w in layers))


@dataclass(frozen=True, eq=False)
class Move:
    """Row or column i of the narrow tensor is number index[i] of `size` on `axis` of the wide one. index: int64 [K]."""

    axis: int
    index: Tensor
    size: int

    def widen(self, narrow: Tensor) -> Tensor:
        """The narrow tensor in its places, zeros elsewhere."""
        shape = list(narrow.shape)
        shape[self.axis] = self.size
        return narrow.new_zeros(shape).index_copy_(self.axis, self.index.to(narrow.device), narrow)

    def narrow(self, wide: Tensor) -> Tensor:
        """What lies in the narrow tensor's places."""
        return wide.index_select(self.axis, self.index.to(wide.device))


def move_tensors(tensors: dict[str, Tensor], moves: dict[str, Move], *, widen: bool) -> dict[str, Tensor]:
    """Tensors by full name with the moves (by name without ".weight") carried out; the others as they are."""
    moved = dict(tensors)
    for module, move in moves.items():
        # a consumer's bias has one entry per output: it does not move
        for name in (f"{module}.weight", f"{module}.bias")[: 2 - move.axis]:
            if name in tensors:
                moved[name] = move.widen(tensors[name]) if widen else move.narrow(tensors[name])
    return moved


def reduction_moves(site: Site, reduction: Reduction) -> dict[str, Move]:
    """Where a site's narrow tensors lie in its own: a selection's in their old places, cluster k of a folding in k."""
    kept = reduction.kept if isinstance(reduction, Selection) else torch.arange(reduction.kept_width)
    count, rows = site.units.count, {producer.name: producer.rows_per_unit for producer in site.producers}
    moves = {name: Move(0, expand(kept, size), count * size) for name, size in rows.items()}
    moves[site.consumer] = Move(1, expand(kept, site.units.size), site.units.width)
    return moves


def unit_moves(
    prefix: str, head_dim: int, wide: LayerWidths, heads: Tensor, kv_heads: Tensor, channels: Tensor
) -> dict[str, Move]:
    """Moves of a layer (`prefix` ends in a dot) made of some of a wide one's heads and channels, int64 each."""
    queries, keys = expand(heads, head_dim), expand(kv_heads, head_dim)
    found = {
        "q_proj": Move(0, queries, wide.heads * head_dim),
        "k_proj": Move(0, keys, wide.kv_heads * head_dim),
        "v_proj": Move(0, keys, wide.kv_heads * head_dim),
        "o_proj": Move(1, queries, wide.heads * head_dim),
        "gate_proj": Move(0, channels, wide.channels),
        "up_proj": Move(0, channels, wide.channels),
        "down_proj": Move(1, channels, wide.channels),
    }
    return {f"{prefix}{LINEARS[name]}.{name}": move for name, move in found.items()}


def widening_moves(prefix: str, head_dim: int, narrow: LayerWidths, wide: LayerWidths) -> dict[str, Move]:
    """A narrow layer in the first places of a wide one, its query heads in the groups of their key/value heads."""
    groups = torch.arange(narrow.kv_heads)
    heads = (groups[:, None] * wide.shared + torch.arange(narrow.shared)).flatten()
    return unit_moves(prefix, head_dim, wide, heads, groups, torch.arange(narrow.channels))
