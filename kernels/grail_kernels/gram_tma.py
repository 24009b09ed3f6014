"""The Gram and cross-moment kernels with tensor descriptors: the copy engine of sm_90 and later fetches whole blocks.

Shapes as in gram_triton.py, for one site; the parts of a float32 operand lie one below the other, each with a whole
number of blocks of rows. Same sums in the same order as the pointer kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gram_triton import add_tile, decode_cross, decode_program


@triton.jit
def tma_chain(
    a_desc, b_desc, m0, n0, part_rows, first, last,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PHASES: tl.constexpr, EVERY: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Aᵀ B over rows first..last of blocks [BLOCK_K, BLOCK_M] and [BLOCK_K, BLOCK_N]; low parts begin at part_rows."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, tl.cdiv(last - first, BLOCK_K) * PHASES):
        phase = step % PHASES
        k = first + (step // PHASES) * BLOCK_K
        a = a_desc.load([k + (phase == 2).to(tl.int32) * part_rows, m0])
        b = b_desc.load([k + (phase == 1).to(tl.int32) * part_rows, n0])
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        part = tl.dot(tl.trans(a), b, part)
        if step % EVERY == EVERY - 1:
            acc += part
            part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    return acc + part


@triton.jit(do_not_specialize=["rows", "width"])
def gram_tma_kernel(
    rows_desc, cols_desc, out_ptr, rows, width, part_rows, split_rows, out_size: tl.int64,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr, STEP: tl.constexpr,
    PHASES: tl.constexpr, EVERY: tl.constexpr, ADD: tl.constexpr, EPILOGUE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """rows_desc and cols_desc describe x [Q * part_rows, readable] (Q = 1: [T, readable]) in blocks
    [BLOCK_K, BLOCK_M] and [BLOCK_K, TILE]; out [P, out_size] float32 panels. Grid: (programs, P)."""
    panel, block = decode_program(tl.program_id(0), SPAN, STEP)
    split = tl.program_id(1)
    start = panel * TILE
    end = tl.minimum(start + TILE, width)
    if (start >= width) | (block * BLOCK_M >= end):
        return
    first = split * split_rows
    acc = tma_chain(
        rows_desc, cols_desc, block * BLOCK_M, start, part_rows, first, tl.minimum(first + split_rows, rows),
        BLOCK_M, TILE, BLOCK_K, PHASES, EVERY, UPCAST,
    )  # fmt: skip
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    panel_ptr = out_ptr + split.to(tl.int64) * out_size + (panel.to(tl.int64) * (panel + 1) // 2) * TILE * TILE
    add_tile(acc, panel_ptr + m.to(tl.int64) * TILE, m < end, 0, TILE, BLOCK_M, TILE, ADD, EPILOGUE)


@triton.jit(do_not_specialize=["rows", "width"])
def cross_tma_kernel(
    rows_desc, cols_desc, out_ptr, rows, width, columns, part_rows, split_rows,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr, PHASES: tl.constexpr,
    EVERY: tl.constexpr, ADD: tl.constexpr, EPILOGUE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """rows_desc of x and cols_desc of y [.., O], as above; out [P, H, O] float32. Grid: (row blocks * column blocks,
    P)."""
    m0, n0 = decode_cross(width, columns, BLOCK_M, BLOCK_N, SPAN)
    split = tl.program_id(1)
    first = split * split_rows
    acc = tma_chain(
        rows_desc, cols_desc, m0, n0, part_rows, first, tl.minimum(first + split_rows, rows),
        BLOCK_M, BLOCK_N, BLOCK_K, PHASES, EVERY, UPCAST,
    )  # fmt: skip
    m = m0 + tl.arange(0, BLOCK_M)
    row_ptr = out_ptr + (split.to(tl.int64) * width + m.to(tl.int64)) * columns
    add_tile(acc, row_ptr, m < width, n0, columns, BLOCK_M, BLOCK_N, ADD, EPILOGUE)
