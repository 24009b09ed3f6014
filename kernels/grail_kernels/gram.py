"""Streaming Gram matrix G = XᵀX, and cross moment C = XᵀY, of activations that never exist all at once.

Shapes: S sites, T rows (tokens) of one update, H width, O columns of a second operand.

Numerics: products and sums in float32 whatever the input dtype (float32 inputs on a GPU: three bf16 dots). One
accumulation chain is at most 8,192 rows (2,048 when precise); chains are summed into G, so the error does not grow with
the length of a chain (DESIGN section 5). Rows that the mask leaves out are never multiplied: 0 * NaN cannot leak.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .dispatch import backend as choose_backend
from .packed import PackedSymmetric, default_tile, packed_size

CHAIN_ROWS = 8192
CHAIN_ROWS_PRECISE = 2048
NARROW, NARROW_CHAIN_ROWS = 32, 512
SQUARE_LEAF = 128


def gram_reference(x_TH: Tensor) -> Tensor:
    """XᵀX in float64, [H, H]: the specification that every implementation is tested against."""
    x_TH = x_TH.double()
    return x_TH.mT @ x_TH


def cross_reference(x_TH: Tensor, y_TO: Tensor) -> Tensor:
    """XᵀY in float64, [H, O]."""
    return x_TH.double().mT @ y_TO.double()


class GramAccumulator:
    """Accumulates G = Σ xᵀx, the column sums and the row count of rows x [..., width].

    With `sites=S` S independent matrices at once, from x [S, ..., width] (heads, experts, or layers stacked): every
    result then has a leading S axis. State is float32 in packed lower tiles: about 2·width² bytes per site. `precise`
    bounds the accumulation chain at 2,048 rows. `backend` overrides the dispatch ("reference", "torch", "triton").
    """

    def __init__(
        self,
        width: int,
        *,
        device=None,
        precise: bool = False,
        sites: int | None = None,
        tile: int | None = None,
        backend: str | None = None,
    ):
        self.width, self.sites, self.precise = width, sites, precise
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
        self._symmetric = True

    def update(self, x: Tensor, mask: Tensor | None = None) -> GramAccumulator:
        """Add the rows of x [..., width] (floating point, any strides), or [S, ..., width] with sites. mask: the shape
        of x without its last axis, True = the row counts. Raises ValueError for shapes that do not fit."""
        leading = () if self.sites is None else (self.sites,)
        if x.dim() < 1 + len(leading) or x.shape[-1] != self.width or x.shape[: len(leading)] != leading:
            raise ValueError(f"expected {[*leading, '...', self.width]}, got {list(x.shape)}")
        x_STH, mask_ST = _as_rows(x.detach(), mask, self.sites or 1)
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

            self._sum += gram_add(self._data, _device_dtype(x_STH, self.device), _to(mask_ST, self.device))
            return
        accumulate = _accumulate_reference if self.backend.name == "reference" else _accumulate_panels
        for site, packed in enumerate(self._packed):
            x_TH = x_STH[site] if mask_ST is None else x_STH[site][mask_ST[site]]
            x_TH = x_TH.to(self.device, torch.float32)
            accumulate(packed, x_TH)
            self._sum[site] += x_TH.sum(0)

    @property
    def packed(self) -> PackedSymmetric | list[PackedSymmetric]:
        """The matrix (one per site with sites), exactly symmetric; the live storage, not a copy."""
        if not self._symmetric:
            for packed in self._packed:
                packed.symmetrize_()
            self._symmetric = True
        return self._packed[0] if self.sites is None else self._packed

    @property
    def sum(self) -> Tensor:
        """Column sums, float64 [H] ([S, H] with sites)."""
        return self._sum[0] if self.sites is None else self._sum

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
        """Sum over the processes of a torch.distributed group; float32 matrices, float64 sums."""
        import torch.distributed as dist

        count = self._count.to(self.device)
        for tensor in (self._data, self._sum, count):
            dist.all_reduce(tensor, group=group)
        self._count = count.cpu()
        return self

    def state_dict(self) -> dict:
        """Copies of the tensors and numbers from which `load_state_dict` continues with the same bits."""
        return {
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
        self.precise = bool(state["precise"])
        self._symmetric = False


class CrossAccumulator:
    """Accumulates C = Σ xᵀy of rows x [..., width] and y [..., columns], float32 [width, columns], with the chain
    bound, mask and split of GramAccumulator."""

    def __init__(self, width: int, columns: int, *, device=None, precise: bool = False, backend: str | None = None):
        self.width, self.columns, self.precise = width, columns, precise
        self.device = torch.device(device or "cpu")
        self.backend = choose_backend("gram", self.device, backend)
        self.value = torch.zeros(width, columns, dtype=torch.float32, device=self.device)
        self.count = 0

    def update(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> CrossAccumulator:
        """Add rows; mask True = the row counts. Raises ValueError for shapes that do not fit."""
        if x.shape[:-1] != y.shape[:-1] or (x.shape[-1], y.shape[-1]) != (self.width, self.columns):
            raise ValueError(f"rows {list(x.shape)} and {list(y.shape)} do not fit {self.width} x {self.columns}")
        (x_STH, mask_ST), (y_STO, _) = _as_rows(x.detach(), mask, 1), _as_rows(y.detach(), None, 1)
        x_TH, y_TO, mask_T = x_STH[0], y_STO[0], None if mask_ST is None else mask_ST[0]
        chain_rows = CHAIN_ROWS_PRECISE if self.precise else CHAIN_ROWS
        for start in range(0, len(x_TH), chain_rows):
            rows = slice(start, start + chain_rows)
            self._add(x_TH[rows], y_TO[rows], None if mask_T is None else mask_T[rows])
        self.count += len(x_TH) if mask_T is None else int(mask_T.sum())
        return self

    def _add(self, x_TH: Tensor, y_TO: Tensor, mask_T: Tensor | None) -> None:
        if self.backend.name == "triton":
            from .launch import cross_add

            dtype = x_TH.dtype if x_TH.dtype == y_TO.dtype else torch.float32
            x_TH, y_TO = (_device_dtype(v.to(dtype), self.device) for v in (x_TH, y_TO))
            cross_add(self.value, x_TH, y_TO, _to(mask_T, self.device))
            return
        if mask_T is not None:
            x_TH, y_TO = x_TH[mask_T], y_TO[mask_T]
        if self.backend.name == "reference":
            self.value += cross_reference(x_TH.to(self.device), y_TO.to(self.device)).float()
            return
        x_TH, y_TO = x_TH.to(self.device, torch.float32), y_TO.to(self.device, torch.float32)
        _add_product(self.value, x_TH, y_TO)

    def all_reduce(self, group=None) -> CrossAccumulator:
        """Sum over the processes of a torch.distributed group."""
        import torch.distributed as dist

        count = torch.tensor(self.count, device=self.device)
        dist.all_reduce(self.value, group=group)
        dist.all_reduce(count, group=group)
        self.count = int(count)
        return self

    def state_dict(self) -> dict:
        """Copies, from which `load_state_dict` continues with the same bits."""
        return {"value": self.value.clone(), "count": self.count, "precise": self.precise}

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`; raises ValueError when the shape differs."""
        if state["value"].shape != self.value.shape:
            raise ValueError(f"state is {list(state['value'].shape)}, this {list(self.value.shape)}")
        self.value.copy_(state["value"])
        self.count, self.precise = int(state["count"]), bool(state["precise"])


def _as_rows(x: Tensor, mask: Tensor | None, sites: int) -> tuple[Tensor, Tensor | None]:
    """x as [S, T, H], without a copy where its strides allow, and the mask as bool [S, T]."""
    if not x.is_floating_point():
        raise TypeError(f"expected floating-point activations, got {x.dtype}")
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ValueError(f"mask {list(mask.shape)} does not match rows {list(x.shape[:-1])}")
    x_STH = x.reshape(sites, -1, x.shape[-1]) if x.numel() else x.new_empty(sites, 0, x.shape[-1])
    return x_STH, None if mask is None else mask.bool().reshape(sites, -1)


def _device_dtype(x: Tensor, device: torch.device) -> Tensor:
    """On the device, in a dtype that the kernels read: bf16 and fp16 as they are, all else float32."""
    kept = x.dtype in (torch.bfloat16, torch.float16)
    return x.to(device, x.dtype if kept else torch.float32)


def _to(mask: Tensor | None, device: torch.device) -> Tensor | None:
    return None if mask is None else mask.to(device)


def _accumulate_panels(packed: PackedSymmetric, x_TH: Tensor) -> None:
    """One GEMM per panel for what lies above its diagonal tile, and the upper half of that tile; then added. The half
    above the diagonal tiles, and most of the other half of those, is never computed."""
    for panel, (start, end) in zip(packed.panels, packed.bounds, strict=True):
        if start:
            _add_product(panel[:start], x_TH[:, :start], x_TH[:, start:end])
        _add_square(panel[start:end], x_TH[:, start:end])


def _add_square(out_WW: Tensor, x_TW: Tensor) -> None:
    """The upper triangle (at least) of out += XᵀX, by halves down to squares that a BLAS still multiplies fast."""
    width = x_TW.shape[1]
    if width <= SQUARE_LEAF or x_TW.device.type != "cpu":
        _add_product(out_WW, x_TW, x_TW)
        return
    half = (width // 2 + 15) // 16 * 16
    _add_square(out_WW[:half, :half], x_TW[:, :half])
    _add_product(out_WW[:half, half:], x_TW[:, :half], x_TW[:, half:])
    _add_square(out_WW[half:, half:], x_TW[:, half:])


def _add_product(out_HO: Tensor, x_TH: Tensor, y_TO: Tensor) -> None:
    """out += XᵀY. A BLAS sums the rows of a very narrow product one after the other, so those are cut shorter."""
    narrow = min(out_HO.shape) < NARROW
    rows = NARROW_CHAIN_ROWS if narrow else max(len(x_TH), 1)
    for x_part, y_part in zip(x_TH.split(rows), y_TO.split(rows), strict=True):
        out_HO += x_part.mT @ y_part


def _accumulate_reference(packed: PackedSymmetric, x_TH: Tensor) -> None:
    gram_HH = gram_reference(x_TH)
    for panel, (start, end) in zip(packed.panels, packed.bounds, strict=True):
        panel += gram_HH[:end, start:end]
