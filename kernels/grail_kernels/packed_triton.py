"""Triton kernels on packed panels (padded layout, see packed.py): gather, scatter, product with a dense matrix.

Shapes: H width, b tile edge, R rows and C columns asked, M columns of the dense operand.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _where(i, j, TILE: tl.constexpr):
    """Position of G[i, j] in the packed numbers: row min(i, j) of the panel that holds column max(i, j)."""
    high = tl.maximum(i, j).to(tl.int64)
    low = tl.minimum(i, j).to(tl.int64)
    panel = high // TILE
    return (panel * (panel + 1) // 2) * TILE * TILE + low * TILE + (high - panel * TILE)


@triton.jit(do_not_specialize=["rows_ptr", "cols_ptr", "out_ptr", "R", "C", "stride_r"])
def gather_kernel(
    packed_ptr, rows_ptr, cols_ptr, out_ptr, R, C, stride_r: tl.int64, TILE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out [R, C] = G[rows][:, cols]. Grid: (row blocks, column blocks)."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i = tl.load(rows_ptr + r, mask=r < R, other=0)
    j = tl.load(cols_ptr + c, mask=c < C, other=0)
    inside = (r < R)[:, None] & (c < C)[None, :]
    value = tl.load(packed_ptr + _where(i[:, None], j[None, :], TILE), mask=inside, other=0.0)
    tl.store(out_ptr + r.to(tl.int64)[:, None] * stride_r + c[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["index_ptr", "value_ptr", "N", "stride_n"])
def scatter_kernel(
    packed_ptr, index_ptr, value_ptr, N, stride_n: tl.int64, TILE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """G[index][:, index] = value [N, N], of which only the lower triangle is read."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i = tl.load(index_ptr + r, mask=r < N, other=0)
    j = tl.load(index_ptr + c, mask=c < N, other=0)
    inside = (r < N)[:, None] & (c < N)[None, :] & (c[None, :] <= r[:, None])
    value = tl.load(value_ptr + r.to(tl.int64)[:, None] * stride_n + c[None, :], mask=inside, other=0.0)
    tl.store(packed_ptr + _where(i[:, None], j[None, :], TILE), value, mask=inside)
    # inside a diagonal tile both triangles are stored
    mirrored = inside & ((i[:, None] // TILE) == (j[None, :] // TILE))
    high, low = tl.maximum(i[:, None], j[None, :]).to(tl.int64), tl.minimum(i[:, None], j[None, :]).to(tl.int64)
    panel = high // TILE
    mirror = (panel * (panel + 1) // 2) * TILE * TILE + high * TILE + (low - panel * TILE)
    tl.store(packed_ptr + mirror, value, mask=mirrored)


@triton.jit(do_not_specialize=["dense_ptr", "width", "columns"])
def matmul_kernel(
    packed_ptr, dense_ptr, out_ptr, width, columns,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out [H, M] = G dense [H, M], float32 (PRECISION: tf32 in three passes, or ieee where there is none).

    Grid: (row blocks, blocks of M). BLOCK_M and BLOCK_K divide TILE. What lies left of the diagonal is read transposed
    from the row block's own panel, the rest from the panels of its columns. Element by element (4-byte copies): a
    matrix read once does not pay for two layouts.
    """
    m0 = tl.program_id(0) * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = (m0 // TILE).to(tl.int64)
    own = packed_ptr + (block * (block + 1) // 2) * TILE * TILE
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, width, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        panel = tl.full((), 0, tl.int64) + k0 // TILE
        if panel <= block:
            where = own + k.to(tl.int64)[None, :] * TILE + (m - block * TILE)[:, None]
        else:
            theirs = packed_ptr + (panel * (panel + 1) // 2) * TILE * TILE
            where = theirs + m.to(tl.int64)[:, None] * TILE + (k - panel * TILE)[None, :]
        g = tl.load(where, mask=(m < width)[:, None] & (k < width)[None, :], other=0.0)
        d_where = dense_ptr + k.to(tl.int64)[:, None] * columns + n[None, :]
        d = tl.load(d_where, mask=(k < width)[:, None] & (n < columns)[None, :], other=0.0)
        acc = tl.dot(g, d, acc, input_precision=PRECISION)
    out = out_ptr + m.to(tl.int64)[:, None] * columns + n[None, :]
    tl.store(out, acc, mask=(m < width)[:, None] & (n < columns)[None, :])
