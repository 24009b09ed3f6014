"""Streaming Gram matrix G = XᵀX of activations that never exist all at once.

Shapes: T rows (tokens) of one update, H width.

Numerics: products and sums in float32 whatever the input dtype. One accumulation chain is at most 8,192 rows
(2,048 when precise); chains are summed into G, so the error does not grow with the length of a chain
(DESIGN section 5). Rows that the mask leaves out are never multiplied: 0 * NaN cannot leak.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import backend as choose_backend
from .packed import PackedSymmetric

CHAIN_ROWS = 8192
CHAIN_ROWS_PRECISE = 2048
NARROW, NARROW_CHAIN_ROWS = 32, 512


def gram_reference(x_TH: Tensor) -> Tensor:
    """XᵀX in float64, [H, H]: the specification that every implementation is tested against."""
    x_TH = x_TH.double()
    return x_TH.mT @ x_TH


class GramAccumulator:
    """Accumulates G = Σ xᵀx, the column sums and the row count of rows x [..., width].

    State is float32 in packed lower tiles: about 2·width² bytes. `precise` bounds the accumulation chain at
    2,048 rows. `backend` overrides the dispatch ("reference", "torch"); see `grail_kernels.backend`.
    """

    def __init__(self, width: int, *, device=None, precise: bool = False, tile=None, backend=None):
        self.packed = PackedSymmetric(width, tile=tile, device=device)
        self.width = width
        self.device = self.packed.device
        self.precise = precise
        self.count = 0
        self.sum = torch.zeros(width, dtype=torch.float64, device=self.device)
        self.backend = choose_backend("gram", self.device, backend)
        self._accumulate = {"reference": _accumulate_reference, "torch": _accumulate_panels}[self.backend.name]

    def update(self, x: Tensor, mask: Tensor | None = None) -> GramAccumulator:
        """Add the rows of x [..., width] (floating point, any strides). mask [...] True = the row counts."""
        if x.dim() < 1 or x.shape[-1] != self.width:
            raise ValueError(f"expected rows of width {self.width}, got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"expected floating-point activations, got {x.dtype}")
        if mask is not None and mask.shape != x.shape[:-1]:
            raise ValueError(f"mask {tuple(mask.shape)} does not match rows {tuple(x.shape[:-1])}")
        rows_TH = x.detach().reshape(-1, self.width) if mask is None else x.detach()[mask.bool()]
        for chain_TH in rows_TH.split(CHAIN_ROWS_PRECISE if self.precise else CHAIN_ROWS):
            chain_TH = chain_TH.to(self.device, torch.float32)
            self._accumulate(self.packed, chain_TH)
            self.sum += chain_TH.sum(0)
            self.count += chain_TH.shape[0]
        self.packed.symmetrize_()
        return self

    def gather(self, rows: Tensor, cols: Tensor) -> Tensor:
        """G[rows][:, cols], float32 [R, C]."""
        return self.packed.gather(rows, cols)

    def diagonal(self) -> Tensor:
        """Per-channel sum of squares, float32 [H]."""
        return self.packed.diagonal()

    def to_dense(self) -> Tensor:
        """The whole of G, float32 [H, H]."""
        return self.packed.to_dense()

    def state_dict(self) -> dict:
        """Copies of the tensors and numbers from which `load_state_dict` continues with the same bits."""
        return {
            "packed": self.packed.data.clone(),
            "tile": self.packed.tile,
            "width": self.width,
            "sum": self.sum.clone(),
            "count": self.count,
            "precise": self.precise,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`; raises ValueError when the width differs."""
        if state["width"] != self.width:
            raise ValueError(f"state is of width {state['width']}, this accumulator of width {self.width}")
        self.packed = PackedSymmetric(self.width, tile=state["tile"], device=self.device)
        self.packed.data.copy_(state["packed"])
        self.sum = state["sum"].to(self.device, torch.float64).clone()
        self.count = int(state["count"])
        self.precise = bool(state["precise"])


def _accumulate_panels(packed: PackedSymmetric, x_TH: Tensor) -> None:
    """One GEMM per panel, then added; the half above the diagonal tiles is never computed. A BLAS sums the rows of a
    very narrow product one after the other, so those are cut shorter."""
    for panel, (start, end) in zip(packed.panels, packed.bounds, strict=True):
        rows = NARROW_CHAIN_ROWS if end - start < NARROW else max(len(x_TH), 1)
        for part_TH in x_TH.split(rows):
            panel += part_TH[:, :end].mT @ part_TH[:, start:end]


def _accumulate_reference(packed: PackedSymmetric, x_TH: Tensor) -> None:
    gram_HH = gram_reference(x_TH)
    for panel, (start, end) in zip(packed.panels, packed.bounds, strict=True):
        panel += gram_HH[:end, start:end]
