"""What the Gram and cross-moment kernels read: 16-bit rows, aligned, zero where nothing counts. Imported with Triton.

Shapes: S sites, T rows, H width, Q parts (2 for what is multiplied as float32), T' and R rows and columns as stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import gram_triton

ALIGNMENT = 16
ELEMENTWISE_BLOCK = 1024


def parts_of(x_STH: Tensor, mask_ST: Tensor | None, shift_SH: Tensor | None, block_rows: int) -> Tensor:
    """[S, Q, T', R], R the width rounded up to 16 and all strides multiples of 16: x itself where it is 16-bit, aligned
    and without mask or shift, else an aligned copy. float32, or x - shift [S, H], comes as two bf16 parts, whose T' is
    a multiple of `block_rows`. Copies are zero from row T and column H on and where mask [S, T] is False.

    A copy costs one pass over x; kernels for narrow or masked loads are slower, and more code to check."""
    sites, rows, width = x_STH.shape
    split = x_STH.dtype == torch.float32 or shift_SH is not None
    if not split and mask_ST is None and is_aligned(x_STH):
        return x_STH[:, None]
    dtype = torch.bfloat16 if split else x_STH.dtype
    stored_rows = round_up(rows, block_rows) if split else rows
    parts = torch.empty(
        sites, 2 if split else 1, stored_rows, round_up(width, ALIGNMENT), dtype=dtype, device=x_STH.device
    )
    grid = (stored_rows, -(-parts.shape[3] // ELEMENTWISE_BLOCK))
    for site in range(sites):
        x_TH = x_STH[site]
        gram_triton.parts_kernel[grid](
            x_TH,
            x_TH if shift_SH is None else shift_SH[site],
            parts.view(torch.uint8) if mask_ST is None else mask_ST[site].contiguous().view(torch.uint8),
            parts[site, 0], parts[site, -1], rows, width, parts.shape[3], x_TH.stride(0), x_TH.stride(1),
            HAS_SHIFT=shift_SH is not None, HAS_MASK=mask_ST is not None, SPLIT=split, BLOCK=ELEMENTWISE_BLOCK,
        )  # fmt: skip
    return parts


def column_sums(parts_SQTR: Tensor, width: int) -> Tensor:
    """Σ over rows of what the parts stand for, float32 [S, H]."""
    return parts_SQTR.sum(2, dtype=torch.float32).sum(1)[:, :width]


def phases_of(parts_SQTR: Tensor) -> int:
    """Products of parts that make one product of operands."""
    return 3 if parts_SQTR.shape[1] == 2 else 1


def one_below_the_other(parts_SQTR: Tensor) -> Tensor:
    """The parts of the only site as rows [Q T', R], a view."""
    parts_QTR = parts_SQTR[0]
    return parts_QTR[0] if len(parts_QTR) == 1 else parts_QTR.view(-1, parts_QTR.shape[2])


def is_aligned(x_STH: Tensor) -> bool:
    """Rows of unit stride, one behind the other, that 16-byte copies can fetch whole."""
    sites, rows, width = x_STH.shape
    if rows > 1 and x_STH.stride(1) < width:
        return False  # the copy engine's manual says nothing of rows that overlap
    steps = [width, x_STH.stride(1), *([x_STH.stride(0)] if sites > 1 else [])]
    return x_STH.stride(2) == 1 and x_STH.data_ptr() % 16 == 0 and all(step % ALIGNMENT == 0 for step in steps)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
