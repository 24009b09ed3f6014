"""Streaming Gram matrix G = XᵀX of activations that never exist all at once.

Shapes: S sites, T rows (tokens) of one update, H width.

Numerics: products and sums in float32 whatever the input dtype and the caller's autocast (float32 inputs on a GPU:
three bf16 products). One accumulation chain is at most 8,192 rows (2,048 when precise), 64 below a width of 32, where
a BLAS sums row after row; in the kernels 512 products (128): the matrix units do not round to nearest. Chains are
summed into G, so the error does not grow with the rows (DESIGN section 5). Rows that the mask leaves out count as
zeros, whatever they hold: 0 * NaN cannot leak. The torch path on CUDA obeys torch.backends.cuda.matmul.allow_tf32,
which is off by default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .dispatch import backend as choose_backend
from .gram_torch import add_gram, add_reference, column_sums
from .inputs import (
    Device,
    as_rows,
    device_dtype,
    device_of,
    isolated,
    mean_rows,
    plain,
    positive,
    to_device,
    whole_state,
)
from .packed import PackedSymmetric, default_tile, packed_size

CHAIN_ROWS = 8192
CHAIN_ROWS_PRECISE = 2048


class GramAccumulator:
    """Accumulates G = Σ xᵀx, the column sums and the row count of rows x [..., width].

    With `sites=S` S independent matrices at once, from x [S, ..., width] (heads, experts, or layers stacked): every
    result then has a leading S axis. State is float32 in packed lower tiles: about 2·width² bytes per site. `precise`
    bounds the accumulation chain at a quarter. `backend` overrides the dispatch ("reference", "torch", "triton");
    `tile` the edge of the stored tiles, which the kernels fix themselves. Pickles and deep copies keep the bits.

    `centred`: the matrix is the scatter about the mean, Σ (x − μ)(x − μ)ᵀ, for channels whose mean is large against
    their deviation. Rows are shifted by the mean of the first rows that count before they are multiplied, so nothing
    cancels (DESIGN section 1, affine form); reading the matrix moves that origin to the mean of all rows so far.
    `raw_packed` gives Σ x xᵀ.
    """

    @isolated
    def __init__(
        self,
        width: int,
        *,
        device: Device = None,
        precise: bool = False,
        centred: bool = False,
        sites: int | None = None,
        tile: int | None = None,
        backend: str | None = None,
    ):
        positive(width=width, sites=sites, tile=tile)
        self.width, self.sites, self.precise, self.centred = width, sites, precise, centred
        self.device = device_of(device)
        self.backend = choose_backend("gram", self.device, backend)
        kernels = self.backend.name == "triton"
        if kernels:
            from .launch import tile_of

            fixed = tile_of(self.device)
            if tile not in (None, fixed):
                raise ValueError(f"the Triton kernels store tiles of {fixed}, not {tile}; leave tile out")
            tile = fixed
        self._allocate(tile or default_tile(width, self.device), padded=kernels)

    def _allocate(self, tile: int, *, padded: bool) -> None:
        count = self.sites or 1
        size = packed_size(self.width, tile, padded=padded)
        self._data = torch.zeros(count, size, dtype=torch.float32, device=self.device)
        self.device = self._data.device  # "cuda" has become "cuda:0"
        name = "triton" if self.backend.name == "triton" else "torch"
        self._packed = [
            PackedSymmetric(self.width, tile=tile, padded=padded, data=row, backend=name) for row in self._data
        ]
        self._sum = torch.zeros(count, self.width, dtype=torch.float64, device=self.device)
        self._count = torch.zeros(count, dtype=torch.int64)
        self._shift: Tensor | None = None
        self._symmetric = True

    @isolated
    def update(self, x: Tensor, mask: Tensor | None = None) -> GramAccumulator:
        """Add the rows of x [..., width] (floating point, any strides), or [S, ..., width] with sites. mask: the shape
        of x without its last axis, bool or integer, True = the row counts. Raises ValueError for shapes that do not
        fit and for tensors without data, TypeError for dtypes and for what is no dense tensor."""
        x = plain("x", x)
        leading = () if self.sites is None else (self.sites,)
        if x.dim() < 1 + len(leading) or x.shape[-1] != self.width or x.shape[: len(leading)] != leading:
            raise ValueError(f"expected {[*leading, '...', self.width]}, got {list(x.shape)}")
        x_STH, mask_ST = as_rows(x, mask, self.sites or 1)
        if self.centred and not self._count.all():
            self._choose_origin(mean_rows(x_STH, mask_ST, CHAIN_ROWS))
        self._symmetric = False
        chain_rows = self._rows_at_once(x_STH, mask_ST)
        for start in range(0, x_STH.shape[1], chain_rows):
            part = x_STH[:, start : start + chain_rows]
            part_mask = None if mask_ST is None else mask_ST[:, start : start + chain_rows]
            self._add(part, part_mask)
        rows = x_STH.shape[1]
        self._count += rows if mask_ST is None else mask_ST.sum(1).cpu()
        return self

    def _rows_at_once(self, x_STH: Tensor, mask_ST: Tensor | None) -> int:
        if self.backend.name == "triton":
            from .launch import rows_at_once

            return rows_at_once(x_STH, self.device, copied=mask_ST is not None or self.centred)
        return CHAIN_ROWS_PRECISE if self.precise else CHAIN_ROWS

    def _add(self, x_STH: Tensor, mask_ST: Tensor | None) -> None:
        if self.backend.name == "triton":
            from .launch import gram_add

            x_STH, mask_ST = device_dtype(x_STH, self.device), to_device(mask_ST, self.device)
            self._sum += gram_add(self._data, x_STH, mask_ST, shift_SH=self._shift, precise=self.precise)
            return
        accumulate = add_reference if self.backend.name == "reference" else add_gram
        for site, packed in enumerate(self._packed):
            x_TH = x_STH[site] if mask_ST is None else x_STH[site][mask_ST[site]]
            x_TH = x_TH.to(self.device, torch.float32)
            if self._shift is not None:
                x_TH = x_TH - self._shift[site]
            accumulate(packed, x_TH)
            self._sum[site] += column_sums(x_TH)

    def _choose_origin(self, mean_SH: Tensor) -> None:
        """Sites without a row so far take the mean of their first ones: their matrices are zero about any origin."""
        mean_SH = mean_SH.to(self.device)
        fresh_S = (self._count == 0).to(self.device)
        self._shift = mean_SH if self._shift is None else torch.where(fresh_S[:, None], mean_SH, self._shift)

    @property
    @isolated
    def packed(self) -> PackedSymmetric | list[PackedSymmetric]:
        """The matrix (one per site with sites), exactly symmetric. It is the live storage, not a copy: valid until the
        next update, `clone()` what has to last."""
        if not self._symmetric:
            if self.centred:
                self._move_origin(self.mean.view(-1, self.width))
            for packed in self._packed:
                packed.symmetrize_()
            self._symmetric = True
        return self._packed[0] if self.sites is None else self._packed

    @property
    @isolated
    def sum(self) -> Tensor:
        """Column sums of x, float64 [H] ([S, H] with sites); a copy."""
        total = self._sum.clone()
        if self._shift is not None:
            total += self._shift.double() * self._count.to(self.device)[:, None]
        return total[0] if self.sites is None else total

    @property
    @isolated
    def mean(self) -> Tensor:
        """Column means of x, float64 [H] ([S, H] with sites); 0 where no row was counted."""
        count = self._count.clamp_min(1).to(self.device)
        return self.sum / (count[0] if self.sites is None else count[:, None])

    @isolated
    def raw_packed(self) -> PackedSymmetric | list[PackedSymmetric]:
        """Σ x xᵀ, whether centred or not: a copy when centred, else the live storage."""
        if not self.centred:
            return self.packed
        _ = self.packed
        moved = [
            packed.clone().shifted_(self._sum[i], int(self._count[i]), self._origin[i])
            for i, packed in enumerate(self._packed)
        ]
        return moved[0] if self.sites is None else moved

    @property
    def _origin(self) -> Tensor:
        return torch.zeros_like(self._sum).float() if self._shift is None else self._shift

    def _move_origin(self, origin_SH: Tensor) -> None:
        """Let the matrices and sums be those of x − origin, rounded to float32."""
        old_SH, new_SH = self._origin, origin_SH.float()
        delta_SH = old_SH.double() - new_SH.double()
        for i, packed in enumerate(self._packed):
            packed.shifted_(self._sum[i], int(self._count[i]), delta_SH[i])
        self._sum += self._count.to(self.device)[:, None] * delta_SH
        self._shift = new_SH

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

    @isolated
    def _each(self, get: Callable[[PackedSymmetric], Tensor]) -> Tensor:
        held = self.packed
        return get(held) if isinstance(held, PackedSymmetric) else torch.stack([get(packed) for packed in held])

    @isolated
    def all_reduce(self, group: Any = None) -> GramAccumulator:
        """Sum over the processes of a torch.distributed group; float32 matrices, float64 sums. Centred: about the
        mean of all processes' rows; a process may have none."""
        import torch.distributed as dist

        if self.centred:
            self._agree_on_origin(group)
        count = self._count.to(self.device)
        for tensor in (self._data, self._sum, count):
            dist.all_reduce(tensor, group=group)
        self._count = count.cpu()
        # another process may have added rows without mirroring its tiles, whatever this one has done
        self._symmetric = False
        return self

    def _agree_on_origin(self, group: Any) -> None:
        import torch.distributed as dist

        total_SH, count_S = self.sum.view(-1, self.width), self._count.to(self.device, copy=True)
        for tensor in (total_SH, count_S):
            dist.all_reduce(tensor, group=group)
        self._move_origin(total_SH / count_S.clamp_min(1)[:, None])

    @isolated
    def state_dict(self) -> dict[str, Any]:
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

    @isolated
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, also one made by another backend; raises ValueError when the shape differs and
        where the state is none."""
        whole_state(state, "width", "sites", "tile", "padded", "data", "sum", "count", "precise")
        if (state["width"], state["sites"]) != (self.width, self.sites):
            raise ValueError(f"state is of {state['sites']} x {state['width']}, this of {self.sites} x {self.width}")
        layout = {"tile": state["tile"], "padded": state["padded"]}
        if self.backend.name == "triton" or layout == {"tile": self._packed[0].tile, "padded": self._packed[0].padded}:
            for packed, data in zip(self._packed, state["data"].to(self.device), strict=True):
                packed.copy_(PackedSymmetric(self.width, data=data, backend=packed.backend.name, **layout))
        else:
            self._allocate(state["tile"], padded=state["padded"])
            self._data.copy_(state["data"])
        self._sum = state["sum"].to(self.device, torch.float64, copy=True)
        self._count = state["count"].cpu().clone()
        self.precise, self.centred = bool(state["precise"]), bool(state.get("centred", False))
        shift = state.get("shift")
        self._shift = None if shift is None else shift.to(self.device, torch.float32, copy=True)
        self._symmetric = False

    def __getstate__(self) -> dict[str, Any]:
        return {"device": str(self.device), "backend": self.backend.name, **self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        GramAccumulator.__init__(
            self, state["width"], device=state["device"], sites=state["sites"], backend=state["backend"]
        )
        self.load_state_dict(state)
