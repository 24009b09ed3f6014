"""Streaming cross moment C = XᵀY, with the numerics of gram.py.

Shapes: S sites (always 1 here), T rows of one update, H width of x, O columns of y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import backend as choose_backend
from .gram import CHAIN_ROWS, CHAIN_ROWS_PRECISE, as_rows, device_dtype, to_device
from .gram_torch import add_product, cross_reference


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
        (x_STH, mask_ST), (y_STO, _) = as_rows(x.detach(), mask, 1), as_rows(y.detach(), None, 1)
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
            x_TH, y_TO = (device_dtype(v.to(dtype), self.device) for v in (x_TH, y_TO))
            cross_add(self.value, x_TH, y_TO, to_device(mask_T, self.device))
            return
        if mask_T is not None:
            x_TH, y_TO = x_TH[mask_T], y_TO[mask_T]
        if self.backend.name == "reference":
            self.value += cross_reference(x_TH.to(self.device), y_TO.to(self.device)).float()
            return
        x_TH, y_TO = x_TH.to(self.device, torch.float32), y_TO.to(self.device, torch.float32)
        add_product(self.value, x_TH, y_TO)

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
