"""Streaming cross moment C = XᵀY, with the numerics of gram.py.

Shapes: S sites, T rows of one update, H width of x, O columns of y.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import backend as choose_backend
from .gram import CHAIN_ROWS, CHAIN_ROWS_PRECISE
from .gram_torch import add_product, cross_reference
from .inputs import Device, as_rows, device_dtype, device_of, isolated, plain, positive, to_device, whole_state

COLUMN_MULTIPLE = 16
"""The kernel's output has this many columns or a multiple: every row of it is then aligned."""
SHIFTED_ROWS = 1024
"""So many rows are moved at once: their float64 products are all that is held beside the moment."""


class CrossAccumulator:
    """Accumulates C = Σ xᵀy of rows x [..., width] and y [..., columns], float32 [width, columns], with the chain
    bound, mask and split of GramAccumulator. With `sites=S` S of them at once, from x [S, ..., width] and
    y [S, ..., columns]; `value` is then [S, width, columns]."""

    @isolated
    def __init__(
        self,
        width: int,
        columns: int,
        *,
        device: Device = None,
        precise: bool = False,
        sites: int | None = None,
        backend: str | None = None,
    ):
        positive(width=width, columns=columns, sites=sites)
        self.width, self.columns, self.precise, self.sites = width, columns, precise, sites
        self.device = device_of(device)
        self.backend = choose_backend("gram", self.device, backend)
        stored = -(-columns // COLUMN_MULTIPLE) * COLUMN_MULTIPLE if self.backend.name == "triton" else columns
        self._data = torch.zeros(sites or 1, width, stored, dtype=torch.float32, device=self.device)
        self.device = self._data.device
        self._count = torch.zeros(sites or 1, dtype=torch.int64)

    @property
    def value(self) -> Tensor:
        """C [H, O] ([S, H, O] with sites), float32; the live storage, valid until the next update."""
        value = self._data[..., : self.columns]
        return value[0] if self.sites is None else value

    @property
    def count(self) -> int | list[int]:
        """Rows counted (one number per site with sites)."""
        return int(self._count[0]) if self.sites is None else self._count.tolist()

    @isolated
    def update(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> CrossAccumulator:
        """Add rows; mask bool or integer, True = the row counts. Raises ValueError for shapes that do not fit
        and for tensors without data, TypeError for dtypes and for what is no dense tensor."""
        x, y = plain("x", x), plain("y", y)
        leading = () if self.sites is None else (self.sites,)
        fits = x.dim() >= 1 + len(leading) and x.shape[: len(leading)] == leading and x.shape[:-1] == y.shape[:-1]
        if not fits or (x.shape[-1], y.shape[-1]) != (self.width, self.columns):
            raise ValueError(
                f"rows {list(x.shape)} and {list(y.shape)} do not fit {[*leading, '...', self.width]} and "
                f"{[*leading, '...', self.columns]}"
            )
        (x_STH, mask_ST), (y_STO, _) = as_rows(x, mask, self.sites or 1), as_rows(y, None, self.sites or 1)
        chain_rows = CHAIN_ROWS_PRECISE if self.precise else CHAIN_ROWS
        for start in range(0, x_STH.shape[1], chain_rows):
            rows = slice(start, start + chain_rows)
            for site in range(len(x_STH)):
                mask_T = None if mask_ST is None else mask_ST[site, rows]
                self._add(self._data[site], x_STH[site, rows], y_STO[site, rows], mask_T)
        self._count += x_STH.shape[1] if mask_ST is None else mask_ST.sum(1).cpu()
        return self

    def _add(self, out_HO: Tensor, x_TH: Tensor, y_TO: Tensor, mask_T: Tensor | None) -> None:
        if self.backend.name == "triton":
            from .launch import cross_add

            dtype = x_TH.dtype if x_TH.dtype == y_TO.dtype else torch.float32
            x_TH, y_TO = (device_dtype(v.to(dtype), self.device) for v in (x_TH, y_TO))
            cross_add(out_HO, x_TH, y_TO, to_device(mask_T, self.device), precise=self.precise)
            return
        if mask_T is not None:
            x_TH, y_TO = x_TH[mask_T], y_TO[mask_T]
        if self.backend.name == "reference":
            out_HO += cross_reference(x_TH.to(self.device), y_TO.to(self.device)).float()
            return
        x_TH, y_TO = x_TH.to(self.device, torch.float32), y_TO.to(self.device, torch.float32)
        add_product(out_HO, x_TH, y_TO)

    @isolated
    def shifted_(self, delta: Tensor, sum_y: Tensor) -> CrossAccumulator:
        """From Σ xᵀy to Σ (x + δ)ᵀy, of rows whose y sum to `sum_y`: δ [H] and sums [O] ([S, H] and [S, O] with sites),
        multiplied in float64. Raises ValueError for shapes that do not fit."""
        leading = () if self.sites is None else (self.sites,)
        if delta.shape != (*leading, self.width) or sum_y.shape != (*leading, self.columns):
            raise ValueError(
                f"shift {list(delta.shape)} and sums {list(sum_y.shape)} do not fit {[*leading, self.width]} and "
                f"{[*leading, self.columns]}"
            )
        delta_SH1 = delta.to(self.device, torch.float64).view(-1, self.width, 1)
        sum_S1O = sum_y.to(self.device, torch.float64).view(-1, 1, self.columns)
        for start in range(0, self.width, SHIFTED_ROWS):
            part_SRO = self._data[:, start : start + SHIFTED_ROWS, : self.columns]
            part_SRO += delta_SH1[:, start : start + SHIFTED_ROWS] * sum_S1O
        return self

    @isolated
    def all_reduce(self, group: Any = None) -> CrossAccumulator:
        """Sum over the processes of a torch.distributed group."""
        import torch.distributed as dist

        count = self._count.to(self.device)
        dist.all_reduce(self._data, group=group)
        dist.all_reduce(count, group=group)
        self._count = count.cpu()
        return self

    @isolated
    def state_dict(self) -> dict[str, Any]:
        """Copies, from which `load_state_dict` continues with the same bits."""
        return {"value": self.value.clone(), "count": self._count.clone(), "precise": self.precise, "sites": self.sites}

    @isolated
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, also one made by another backend; raises ValueError when the shape differs and
        where the state is none."""
        whole_state(state, "value", "count", "precise")
        if state["value"].shape != self.value.shape:
            raise ValueError(f"state is {list(state['value'].shape)}, this {list(self.value.shape)}")
        self.value.copy_(state["value"])
        self._count = torch.as_tensor(state["count"], dtype=torch.int64).reshape(-1).cpu().clone()
        self.precise = bool(state["precise"])

    def __getstate__(self) -> dict[str, Any]:
        return {
            "width": self.width, "columns": self.columns, "device": str(self.device), "backend": self.backend.name,
            **self.state_dict(),
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = ("width", "columns", "device", "sites", "backend")
        CrossAccumulator.__init__(self, *(state[n] for n in names[:2]), **{n: state[n] for n in names[2:]})
        self.load_state_dict(state)
