"""Streaming Gram matrix G = XᵀX of activations that never exist all at once.

Shapes: S sites, T rows (tokens) of one update, H width.

Numerics: products and sums in float32 whatever the input dtype (float32 inputs on a GPU: three bf16 dots). One
accumulation chain is at most 8,192 rows (2,048 when precise); chains are summed into G, so the error does not grow with
the length of a chain (DESIGN section 5). Rows that the mask leaves out are never multiplied: 0 * NaN cannot leak.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .dispatch import backend as choose_backend
from .gram_torch import add_gram, add_reference
from .packed import PackedSymmetric, default_tile, packed_size

CHAIN_ROWS = 8192
CHAIN_ROWS_PRECISE = 2048


class GramAccumulator:
    """Accumulates G = Σ xᵀx, the column sums and the row count of rows x [..., width].

    With `sites=S` S independent matrices at once, from x [S, ..., width] (heads, experts, or layers stacked): every
    result then has a leading S axis. State is float32 in packed lower tiles: about 2·width² bytes per site. `precise`
    bounds the accumulation chain at 2,048 rows. `backend` overrides the dispatch ("reference", "torch", "triton").

    `centred`: the matrix is the scatter about the mean, Σ (x − μ)(x − μ)ᵀ, for channels whose mean is large against
    their deviation. Rows are shifted by the mean of the first update before they are multiplied, so nothing cancels
    (DESIGN section 1, affine form); reading the matrix moves that origin to the mean of all rows so far. `raw_packed`
    gives Σ x xᵀ.
    """

    def __init__(
        self,
        width: int,
        *,
        device=None,
        precise: bool = False,
        centred: bool = False,
        sites: int | None = None,
        tile: int | None = None,
        backend: str | None = None,
    ):
        self.width, self.sites, self.precise, self.centred = width, sites, precise, centred
        self.device = torch.device(device or "cpu")
        self.backend = choose_backend("gram", self.device, backend)
        if self.backend.name == "triton":
            from .launch import config_for

            tile = config_for(self.device, torch.bfloat16).tile
        self._allocate(tile or default_tile(width, self.device), padded=self.backend.name == "triton")

    def _allocate(self, tile: int, *, padded: bool) -> None:
        count = self.sites or 1
        size = packed_size(self.width, tile, padded=padded)
        self._data = torch.zeros(count, size, dtype=torch.float32, device=self.device)
        layout = {"tile": tile, "padded": padded, "backend": "triton" if self.backend.name == "triton" else None}
        self._packed = [PackedSymmetric(self.width, data=row, **layout) for row in self._data]
        self._sum = torch.zeros(count, self.width, dtype=torch.float64, device=self.device)
        self._count = torch.zeros(count, dtype=torch.int64)
        self._shift: Tensor | None = None
        self._symmetric = True

    def update(self, x: Tensor, mask: Tensor | None = None) -> GramAccumulator:
        """Add the rows of x [..., width] (floating point, any strides), or [S, ..., width] with sites. mask: the shape
        of x without its last axis, True = the row counts. Raises ValueError for shapes that do not fit."""
        leading = () if self.sites is None else (self.sites,)
        if x.dim() < 1 + len(leading) or x.shape[-1] != self.width or x.shape[: len(leading)] != leading:
            raise ValueError(f"expected {[*leading, '...', self.width]}, got {list(x.shape)}")
        x_STH, mask_ST = as_rows(x.detach(), mask, self.sites or 1)
        if self.centred and self._shift is None:
            self._shift = _mean_rows(x_STH, mask_ST).to(self.device)
        self._symmetric = False
        chain_rows = CHAIN_ROWS_PRECISE if self.precise else CHAIN_ROWS
        for start in range(0, x_STH.shape[1], chain_rows):
            part = x_STH[:, start : start + chain_rows]
            part_mask = None if mask_ST is None else mask_ST[:, start : start + chain_rows]
            self._add(part, part_mask)
        rows = x_STH.shape[1]
        self._count += rows if mask_ST is None else mask_ST.sum(1).cpu()
        return self

    def _add(self, x_STH: Tensor, mask_ST: Tensor | None) -> None:
        if self.backend.name == "triton":
            from .launch import gram_add

            x_STH = device_dtype(x_STH, self.device)
            self._sum += gram_add(self._data, x_STH, to_device(mask_ST, self.device), shift_SH=self._shift)
            return
        accumulate = add_reference if self.backend.name == "reference" else add_gram
        for site, packed in enumerate(self._packed):
            x_TH = x_STH[site] if mask_ST is None else x_STH[site][mask_ST[site]]
            x_TH = x_TH.to(self.device, torch.float32)
            if self._shift is not None:
                x_TH = x_TH - self._shift[site]
            accumulate(packed, x_TH)
            self._sum[site] += x_TH.sum(0)

    @property
    def packed(self) -> PackedSymmetric | list[PackedSymmetric]:
        """The matrix (one per site with sites), exactly symmetric; the live storage, not a copy."""
        if not self._symmetric:
            if self.centred:
                self._move_origin(self.mean.view(-1, self.width))
            for packed in self._packed:
                packed.symmetrize_()
            self._symmetric = True
        return self._packed[0] if self.sites is None else self._packed

    @property
    def sum(self) -> Tensor:
        """Column sums of x, float64 [H] ([S, H] with sites)."""
        total = self._sum
        if self._shift is not None:
            total = total + self._shift.double() * self._count.to(self.device)[:, None]
        return total[0] if self.sites is None else total

    @property
    def mean(self) -> Tensor:
        """Column means of x, float64 [H] ([S, H] with sites); 0 where no row was counted."""
        count = self._count.clamp_min(1).to(self.device)
        return self.sum / (count[0] if self.sites is None else count[:, None])

    def raw_packed(self) -> PackedSymmetric | list[PackedSymmetric]:
        """Σ x xᵀ, whether centred or not: a copy when centred, else the live storage."""
        if not self.centred:
            return self.packed
        _ = self.packed
        moved = [
            packed.clone().shifted_(self._sum[i], int(self._count[i]), self._shift[i] if self._shift is not None else 0)
            for i, packed in enumerate(self._packed)
        ]
        return moved[0] if self.sites is None else moved

    def _move_origin(self, origin_SH: Tensor) -> None:
        """Let the matrices and sums be those of x − origin, rounded to float32."""
        if self._shift is None:
            self._shift = torch.zeros(len(self._data), self.width, device=self.device)
        origin_SH = origin_SH.to(self._shift)
        delta_SH = self._shift.double() - origin_SH.double()
        for i, packed in enumerate(self._packed):
            packed.shifted_(self._sum[i], int(self._count[i]), delta_SH[i])
        self._sum += self._count.to(self.device)[:, None] * delta_SH
        self._shift = origin_SH

    @property
    def count(self) -> int | list[int]:
        """Rows counted (one number per site with sites)."""
        return int(self._count[0]) if self.sites is None else self._count.tolist()

    def gather(self, rows: Tensor, cols: Tensor) -> Tensor:
        """G[rows][:, cols], float32 [R, C]."""
        return self._each(lambda packed: packed.gather(rows, cols))

    def diagonal(self) -> Tensor:
        """Per-channel sum of squares, float32 [H]."""
        return self._each(PackedSymmetric.diagonal)

    def to_dense(self) -> Tensor:
        """The whole of G, float32 [H, H]."""
        return self._each(PackedSymmetric.to_dense)

    def _each(self, get: Callable[[PackedSymmetric], Tensor]) -> Tensor:
        held = self.packed
        return get(held) if self.sites is None else torch.stack([get(packed) for packed in held])

    def all_reduce(self, group=None) -> GramAccumulator:
        """Sum over the processes of a torch.distributed group; float32 matrices, float64 sums. Centred: about the
        mean of all processes' rows; a process may have none."""
        import torch.distributed as dist

        if self.centred:
            self._agree_on_origin(group)
        count = self._count.to(self.device)
        for tensor in (self._data, self._sum, count):
            dist.all_reduce(tensor, group=group)
        self._count = count.cpu()
        return self

    def _agree_on_origin(self, group) -> None:
        import torch.distributed as dist

        total_SH, count_S = self.sum.view(-1, self.width).clone(), self._count.to(self.device)
        for tensor in (total_SH, count_S):
            dist.all_reduce(tensor, group=group)
        self._move_origin(total_SH / count_S.clamp_min(1)[:, None])

    def state_dict(self) -> dict:
        """Copies of the tensors and numbers from which `load_state_dict` continues with the same bits."""
        return {
            "shift": None if self._shift is None else self._shift.clone(),
            "centred": self.centred,
            "data": self._data.clone(),
            "sum": self._sum.clone(),
            "count": self._count.clone(),
            "tile": self._packed[0].tile,
            "padded": self._packed[0].padded,
            "width": self.width,
            "sites": self.sites,
            "precise": self.precise,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`, also one made by another backend; raises ValueError when the shape differs."""
        if (state["width"], state["sites"]) != (self.width, self.sites):
            raise ValueError(f"state is of {state['sites']} x {state['width']}, this of {self.sites} x {self.width}")
        layout = {"tile": state["tile"], "padded": state["padded"]}
        if self.backend.name == "triton" or layout == {"tile": self._packed[0].tile, "padded": self._packed[0].padded}:
            for packed, data in zip(self._packed, state["data"].to(self.device), strict=True):
                packed.copy_(PackedSymmetric(self.width, data=data, **layout))
        else:
            self._allocate(state["tile"], padded=state["padded"])
            self._data.copy_(state["data"])
        self._sum = state["sum"].to(self.device, torch.float64, copy=True)
        self._count = state["count"].cpu().clone()
        self.precise, self.centred = bool(state["precise"]), bool(state.get("centred", False))
        shift = state.get("shift")
        self._shift = None if shift is None else shift.to(self.device, torch.float32, copy=True)
        self._symmetric = False


def as_rows(x: Tensor, mask: Tensor | None, sites: int) -> tuple[Tensor, Tensor | None]:
    """x as [S, T, H], without a copy where its strides allow, and the mask as bool [S, T]."""
    if not x.is_floating_point():
        raise TypeError(f"expected floating-point activations, got {x.dtype}")
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ValueError(f"mask {list(mask.shape)} does not match rows {list(x.shape[:-1])}")
    x_STH = x.reshape(sites, -1, x.shape[-1]) if x.numel() else x.new_empty(sites, 0, x.shape[-1])
    return x_STH, None if mask is None else mask.bool().reshape(sites, -1)


def _mean_rows(x_STH: Tensor, mask_ST: Tensor | None) -> Tensor:
    """Mean of the counted rows, float32 [S, H]; 0 without any."""
    if mask_ST is None:
        return x_STH.mean(1, dtype=torch.float64).nan_to_num(0.0, 0.0, 0.0).float()
    means = [x_TH[mask_T].mean(0, dtype=torch.float64) for x_TH, mask_T in zip(x_STH, mask_ST, strict=True)]
    return torch.stack(means).nan_to_num(0.0, 0.0, 0.0).float()


def device_dtype(x: Tensor, device: torch.device) -> Tensor:
    """On the device, in a dtype that the kernels read: bf16 and fp16 as they are, all else float32."""
    kept = x.dtype in (torch.bfloat16, torch.float16)
    return x.to(device, x.dtype if kept else torch.float32)


def to_device(mask: Tensor | None, device: torch.device) -> Tensor | None:
    return None if mask is None else mask.to(device)
