"""A symmetric matrix in half its memory: panels of lower tiles.

Shapes: H width, R rows asked, C columns asked, M columns of a dense operand.

Block the H channels into tiles of b. Panel i holds G[0:end_i, start_i:end_i], that is the lower tiles
(i, 0) ... (i, i), each transposed, stacked into one row-major matrix. So a panel is a set of tiles for a
tile kernel and one contiguous output for a plain GEMM, X[:, :end].T @ X[:, start:end]. On CPU the last
panel is trimmed to the width; on a GPU it is padded to b columns, so that every panel has the same row stride and
stays aligned. Source: DESIGN section 5 (packed lower tiles); layout by measurement on CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import Backend
from .dispatch import backend as choose_backend
from .inputs import Device, device_of, isolated, overlaps, plain, positive

LAYOUT = Backend("torch", "the layout is not padded")
TRACE_COLUMNS = 256
"""Columns of a panel that `quadratic_trace` takes at once: fewer leave less of the unwanted half to be multiplied."""


def default_tile(width: int, device: torch.device) -> int:
    """Tile edge for a width. CPU: the fastest of 64..1024 on two AVX-512 cores (benchmarks/bench_gram.py); from a width
    of 9,600 on the fastest that keeps the packed matrix below 0.52 of the full one, whose share it is
    0.5 + tile / (2 * width) of."""
    if device.type != "cpu":
        return 128
    if width < 6144:
        return 768
    return 512 if width < 8192 else 384


def packed_size(width: int, tile: int, *, padded: bool) -> int:
    """Numbers stored for a width."""
    starts = range(0, width, tile)
    return sum(min(s + tile, width) * (tile if padded else min(tile, width - s)) for s in starts)


class PackedSymmetric:
    """Symmetric [H, H] matrix, float32 by default, stored as about H(H + b)/2 numbers.

    Every method works on the packed form; only `to_dense` unpacks the whole. `backend` overrides the dispatch ("torch",
    "triton"; the kernels need the padded layout and float32). Autocast and gradients of the caller do not apply. Raises
    ValueError for shapes that do not fit, TypeError for numbers that are no floats, TypeError and IndexError for
    indices. Pickles and deep copies keep the bits, the layout and the backend.
    """

    @isolated
    def __init__(
        self,
        width: int,
        *,
        tile: int | None = None,
        device: Device = None,
        dtype: torch.dtype = torch.float32,
        padded: bool = False,
        data: Tensor | None = None,
        backend: str | None = None,
    ):
        positive(width=width, tile=tile)
        self.width = width
        self.device = device_of(device) if data is None else data.device
        self.tile = tile or default_tile(width, self.device)
        self.padded = padded
        self.backend = choose_backend("packed", self.device, backend) if padded else LAYOUT
        self.bounds = [(s, min(s + self.tile, width)) for s in range(0, width, self.tile)]
        strides = [self.tile if padded else end - start for start, end in self.bounds]
        sizes = [end * stride for (_, end), stride in zip(self.bounds, strides, strict=True)]
        if data is None:
            data = torch.zeros(sum(sizes), dtype=dtype, device=self.device)
        else:
            data = plain("data", data)
        if not data.is_floating_point():
            raise TypeError(f"expected floating-point numbers, got {data.dtype}")
        if data.shape != (sum(sizes),):
            wanted = f"{sum(sizes)} of a width of {width} in tiles of {self.tile}"
            raise ValueError(f"data {list(data.shape)} are not the numbers that there are, {wanted}")
        self.data, self.device = data, data.device
        self.panels = [
            chunk.view(end, stride)[:, : end - start]
            for chunk, (start, end), stride in zip(self.data.split(sizes), self.bounds, strides, strict=True)
        ]

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def _uses_kernels(self) -> bool:
        return self.backend.name == "triton" and self.dtype == torch.float32

    @classmethod
    @isolated
    def from_dense(
        cls, dense_HH: Tensor, *, tile: int | None = None, padded: bool = False, backend: str | None = None
    ) -> PackedSymmetric:
        """Pack a symmetric matrix; only its upper triangle of tiles is read."""
        dense_HH = plain("the matrix", dense_HH)
        if dense_HH.dim() != 2 or dense_HH.shape[0] != dense_HH.shape[1]:
            raise ValueError(f"expected a square matrix, got {list(dense_HH.shape)}")
        layout: dict[str, Any] = {"tile": tile, "padded": padded, "backend": backend}
        packed = cls(dense_HH.shape[0], device=dense_HH.device, dtype=dense_HH.dtype, **layout)
        for panel, (start, end) in zip(packed.panels, packed.bounds, strict=True):
            panel.copy_(dense_HH[:end, start:end])
        return packed

    @isolated
    def copy_(self, other: PackedSymmetric) -> PackedSymmetric:
        """Take the values of another packing of the same width."""
        if other.width != self.width:
            raise ValueError(f"a matrix of width {other.width} does not fit one of {self.width}")
        if (self.tile, self.padded) == (other.tile, other.padded):
            self.data.copy_(other.data)
            return self
        everything = torch.arange(self.width, device=other.device)
        for panel, (start, end) in zip(self.panels, self.bounds, strict=True):
            panel.copy_(other.gather(everything[:end], everything[start:end]))
        return self

    def symmetrize_(self) -> PackedSymmetric:
        """Copy the upper triangle of each diagonal tile onto its lower one, so that symmetry is exact."""
        for panel, (start, end) in zip(self.panels, self.bounds, strict=True):
            square = panel[start:end]
            square.copy_(square.triu() + square.triu(1).mT)
        return self

    @isolated
    def diagonal(self) -> Tensor:
        """[H], a copy."""
        parts = [p[s:e].diagonal() for p, (s, e) in zip(self.panels, self.bounds, strict=True)]
        return torch.cat(parts)

    @isolated
    def to_dense(self) -> Tensor:
        """[H, H], exactly symmetric."""
        dense = self.data.new_empty(self.width, self.width)
        for panel, (start, end) in zip(self.panels, self.bounds, strict=True):
            dense[:end, start:end] = panel
            dense[start:end, :start] = panel[:start].mT
        return dense

    @isolated
    def gather(self, rows: Tensor, cols: Tensor, *, out: Tensor | None = None) -> Tensor:
        """G[rows][:, cols] as [R, C]; rows and cols are integer index vectors in any order. `out` [R, C], of any
        floating dtype and strides, is written whole; ValueError where two of its elements are one number in memory."""
        rows, cols = self._index(rows), self._index(cols)
        if out is None:
            out = self.data.new_empty(len(rows), len(cols))
        if out.shape != (len(rows), len(cols)) or out.device != self.device or not out.is_floating_point():
            wanted = f"{[len(rows), len(cols)]} on {self.device}"
            raise ValueError(f"out {list(out.shape)} of {out.dtype} on {out.device} does not fit {wanted}")
        if overlaps(out):
            raise ValueError(f"elements of out share memory (strides {list(out.stride())}): give a tensor of its own")
        if self._uses_kernels and out.stride(1) == 1 and not out.is_neg() and out.dtype == torch.float32:
            if out.numel():
                from .launch_packed import packed_gather

                packed_gather(self.data, self.tile, rows, cols, out)
            return out
        for panel, (start, end) in zip(self.panels, self.bounds, strict=True):
            in_cols = ((cols >= start) & (cols < end)).nonzero()[:, 0]
            above = (rows < end).nonzero()[:, 0]
            if len(in_cols) and len(above):
                block = panel.index_select(0, rows[above]).index_select(1, cols[in_cols] - start)
                _place(out, above, in_cols, block)
            in_rows = ((rows >= start) & (rows < end)).nonzero()[:, 0]
            left = (cols < start).nonzero()[:, 0]
            if len(in_rows) and len(left):
                block = panel.index_select(0, cols[left]).index_select(1, rows[in_rows] - start)
                _place(out, in_rows, left, block.mT)
        return out

    @isolated
    def scatter_(self, index: Tensor, values: Tensor) -> PackedSymmetric:
        """G[index][:, index] = values [N, N], symmetric, of which the lower triangle is read; distinct indices."""
        index = self._index(index)
        if values.shape != (len(index), len(index)) or len(index.unique()) != len(index):
            raise ValueError(f"values {tuple(values.shape)} do not fit {len(index)} distinct indices")
        values = plain("values", values).to(self.data).contiguous()
        if self._uses_kernels and len(index):
            from .launch_packed import packed_scatter

            packed_scatter(self.data, self.tile, index, values)
            return self
        values = values.tril() + values.tril(-1).mT
        for panel, (start, end) in zip(self.panels, self.bounds, strict=True):
            columns = ((index >= start) & (index < end)).nonzero()[:, 0]
            above = (index < end).nonzero()[:, 0]
            panel[index[above][:, None], index[columns] - start] = values[above][:, columns]
        return self

    @isolated
    def add_outer_(self, u_H: Tensor, v_H: Tensor) -> PackedSymmetric:
        """G += u vᵀ + v uᵀ, the products in float64: moves a Gram matrix to another origin (see `shifted_`)."""
        if u_H.shape != (self.width,) or v_H.shape != (self.width,):
            raise ValueError(f"vectors {list(u_H.shape)} and {list(v_H.shape)} do not fit a width of {self.width}")
        u_H, v_H = (t.to(self.device, torch.float64) for t in (u_H, v_H))
        for panel, (start, end) in zip(self.panels, self.bounds, strict=True):
            outer = torch.outer(u_H[:end], v_H[start:end]).addr_(v_H[:end], u_H[start:end])
            panel.copy_(outer.add_(panel))
        return self

    def shifted_(self, sum_H: Tensor, count: int, delta_H: Tensor) -> PackedSymmetric:
        """From Σ x xᵀ of `count` rows with column sums `sum` to Σ (x + δ)(x + δ)ᵀ."""
        delta_H = delta_H.to(self.device, torch.float64)
        return self.add_outer_(sum_H.to(self.device, torch.float64) + 0.5 * count * delta_H, delta_H)

    @isolated
    def clone(self) -> PackedSymmetric:
        """An independent copy in the same layout."""
        return PackedSymmetric(
            self.width, tile=self.tile, padded=self.padded, data=self.data.clone(), backend=self.backend.name
        )

    @isolated
    def matmul(self, dense_HM: Tensor) -> Tensor:
        """G @ dense, [H, M], multiplied in the dense operand's dtype, at least float32 (by the kernel: float32, in
        three passes of tf32), which is that of the result."""
        dense_HM = self._checked(dense_HM, 0)
        dense_HM = dense_HM.to(torch.promote_types(dense_HM.dtype, torch.float32))
        if self._uses_kernels and dense_HM.dtype == torch.float32 and dense_HM.numel():
            from .launch_packed import packed_matmul

            return packed_matmul(self.data, self.tile, dense_HM)
        out = torch.zeros_like(dense_HM)
        for panel, (start, end) in zip(self.panels, self.bounds, strict=True):
            panel = panel.to(dense_HM.dtype)
            out[:end] += panel @ dense_HM[start:end]
            out[start:end] += panel[:start].mT @ dense_HM[:start]
        return out

    @isolated
    def quadratic_trace(self, dense_OH: Tensor) -> float:
        """tr(E G Eᵀ) for E [O, H]: the energy of E's output on the data of G. Products in E's dtype, at least float32,
        sums in float64; half the multiplications of E @ G."""
        dense_OH = self._checked(dense_OH, 1)
        dense_OH = dense_OH.to(torch.promote_types(dense_OH.dtype, torch.float32))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for panel, (start, end) in zip(self.panels, self.bounds, strict=True):
            panel = panel.to(dense_OH.dtype)
            for left in range(start, end, TRACE_COLUMNS):
                right_OC = dense_OH[:, left : min(left + TRACE_COLUMNS, end)]
                columns = panel[:, left - start :][:, : right_OC.shape[1]]
                if left:
                    off_OC = dense_OH[:, :left] @ columns[:left]
                    total += 2 * torch.sum(off_OC * right_OC, dtype=torch.float64)
                square_CC = columns[left : left + right_OC.shape[1]]
                total += torch.sum((right_OC @ square_CC) * right_OC, dtype=torch.float64)
        return total.item()

    @isolated
    def effective_rank(self) -> float:
        """(tr G)² / ‖G‖_F², the participation ratio of the eigenvalues: 1 for one direction, H for equal ones; 0 of a
        zero matrix. Sums in float64, a tile at a time."""
        energy = torch.zeros((), dtype=torch.float64, device=self.device)
        for panel, (start, _) in zip(self.panels, self.bounds, strict=True):
            for rows, (row, _) in zip(panel.split(self.tile), self.bounds, strict=False):
                energy += (1 if row == start else 2) * rows.double().square().sum()
        return (self.diagonal().double().sum().square() / energy).item() if energy > 0 else 0.0

    def __getstate__(self) -> dict[str, Any]:
        layout = {"width": self.width, "tile": self.tile, "padded": self.padded, "backend": self.backend.name}
        return layout | {"data": self.clone().data}  # of several sites the storage is one: a row of it alone

    def __setstate__(self, state: dict[str, Any]) -> None:
        PackedSymmetric.__init__(self, **state)

    def _checked(self, dense: Tensor, axis: int) -> Tensor:
        """A dense operand is a floating-point matrix with `width` along `axis`, on this device."""
        dense = plain("the operand", dense)
        if dense.dim() != 2 or dense.shape[axis] != self.width:
            raise ValueError(f"operand {list(dense.shape)} does not fit a width of {self.width} (axis {axis})")
        if not dense.is_floating_point():
            raise TypeError(f"expected a floating-point operand, got {dense.dtype}")
        if dense.device != self.device:
            raise ValueError(f"the operand is on {dense.device}, the matrix on {self.device}")
        return dense

    def _index(self, index: Tensor) -> Tensor:
        index = torch.as_tensor(index, device=self.device)
        if index.dtype == torch.bool:
            raise TypeError("gather takes integer indices, not a mask")
        if index.dim() != 1 or (len(index) and (index.is_floating_point() or index.is_complex())):
            raise TypeError(f"expected a vector of integer indices, got {list(index.shape)} of {index.dtype}")
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= self.width):
            raise IndexError(f"index out of range for width {self.width}")
        return index.long().contiguous()


def _place(out_RC: Tensor, rows: Tensor, cols: Tensor, block: Tensor) -> None:
    """out[rows][:, cols] = block, for ascending positions: as a copy where they lie side by side, which writing by
    indices takes ten times as long for."""
    row, col = int(rows[0]), int(cols[0])
    if int(rows[-1]) - row + 1 == len(rows) and int(cols[-1]) - col + 1 == len(cols):
        out_RC[row : row + len(rows), col : col + len(cols)] = block
    else:
        out_RC[rows[:, None], cols] = block.to(out_RC.dtype)
