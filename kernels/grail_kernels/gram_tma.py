"""The Gram kernel with tensor descriptors: the copy engine of sm_90 and later fetches whole blocks of X.

Shapes as in gram_triton.py, for one site and without a row mask: what the copy engine writes to shared memory cannot be
masked on the way, only rows and columns beyond the end of X come as zeros. float32 and masked rows take the pointer
kernel, which computes the same sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gram_triton import add_tile, decode_program


@triton.jit(do_not_specialize=["sum_ptr", "rows", "width"])
def gram_tma_kernel(
    rows_desc, cols_desc, out_ptr, sum_ptr, rows, width, split_rows, out_size: tl.int64,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr, STEP: tl.constexpr,
    ADD: tl.constexpr, EPILOGUE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """rows_desc and cols_desc describe x [T, H] in blocks [BLOCK_K, BLOCK_M] and [BLOCK_K, TILE]; out [P, out_size]
    float32 panels, sum [P, H] float32; split_rows is a multiple of BLOCK_K. Grid: (programs, P)."""
    panel, block = decode_program(tl.program_id(0), SPAN, STEP)
    split = tl.program_id(1)
    start = panel * TILE
    end = tl.minimum(start + TILE, width)
    if (start >= width) | (block * BLOCK_M >= end):
        return
    on_diagonal = block == start // BLOCK_M
    first = split * split_rows
    acc = tl.zeros((BLOCK_M, TILE), dtype=tl.float32)
    total = tl.zeros((TILE,), dtype=tl.float32)
    for k0 in range(first, tl.minimum(first + split_rows, rows), BLOCK_K):
        a = rows_desc.load([k0, block * BLOCK_M])
        b = cols_desc.load([k0, start])
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(tl.trans(a), b, acc)
        if on_diagonal:
            total += tl.sum(b.to(tl.float32), 0)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = start + tl.arange(0, TILE)
    lane = split.to(tl.int64)
    if on_diagonal:
        tl.store(sum_ptr + lane * width + n, total, mask=n < width)
    panel_ptr = out_ptr + lane * out_size + (panel.to(tl.int64) * (panel + 1) // 2) * TILE * TILE
    add_tile(acc, panel_ptr + m.to(tl.int64) * TILE, m < end, 0, TILE, BLOCK_M, TILE, ADD, EPILOGUE)
