"""Many small symmetric positive definite systems at once: factor each, then solve for blocks of right-hand sides.

Shapes: S problems, K <= 128 unknowns, M right-hand sides. Heads, experts, or one matrix with a sweep of λ. The matrices
come scaled to a unit diagonal (see small.py). Two kernels, so that A is factored once however many right-hand sides and
refinement steps follow. A bad problem spoils nobody else's answer.

The factor stays in global memory, a column at a time: a matrix of 128 in registers spills on every target.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["info_ptr", "size"])
def factor_kernel(a_ptr, info_ptr, size, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr):
    """Left-looking Cholesky in place: a [S, K, K] float32 becomes L, its upper triangle zero. info [S]: 0, or the first
    pivot (from 1) that was not positive, as LAPACK's xPOTRF; the factor is then of no use. Grid: (S,)."""
    problem = tl.program_id(0).to(tl.int64)
    a_ptr += problem * size * size
    r = tl.arange(0, BLOCK_K)
    info = 0
    for j in range(0, size):
        at_j = r == j
        column = tl.load(a_ptr + r * size + j, mask=r < size, other=0.0)
        for p0 in range(0, j, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            done = tl.load(
                a_ptr + r[:, None] * size + p[None, :], mask=(r < size)[:, None] & (p < j)[None, :], other=0.0
            )
            row = tl.load(a_ptr + j * size + p, mask=p < j, other=0.0)
            column -= tl.sum(done * row[None, :], 1)
        pivot = tl.sum(tl.where(at_j, column, 0.0), 0)
        bad = (pivot <= 0) | (pivot != pivot)
        info = tl.where((info == 0) & bad, j + 1, info)
        root = tl.sqrt(tl.where(bad, 1.0, pivot))
        lower = tl.where(at_j, root, tl.where(r > j, column / root, 0.0))
        tl.debug_barrier()  # row j and columns before j have been read by every thread
        tl.store(a_ptr + r * size + j, lower, mask=r < size)
        tl.debug_barrier()
    tl.store(info_ptr + problem, info)


@triton.jit(do_not_specialize=["rhs_ptr", "size", "columns"])
def solve_kernel(lower_ptr, rhs_ptr, out_ptr, size, columns, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr):
    """out [S, K, M] = (L Lᵀ)⁻¹ rhs [S, K, M], float32, with the factor of `factor_kernel`. Grid: (S, blocks of M)."""
    problem = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK_K)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (r < size)[:, None] & (m < columns)[None, :]
    lower_ptr += problem * size * size
    where = (problem * size + r[:, None]) * columns + m[None, :]
    y = tl.load(rhs_ptr + where, mask=inside, other=0.0)
    for j in range(0, size):
        at_j = r == j
        lower = tl.load(lower_ptr + r * size + j, mask=r < size, other=0.0)
        root = tl.sum(tl.where(at_j, lower, 0.0), 0)
        solved = tl.sum(tl.where(at_j[:, None], y, 0.0), 0) / root
        y = tl.where(at_j[:, None], solved[None, :], y - lower[:, None] * solved[None, :])
    for step in range(0, size):
        j = size - 1 - step
        at_j = r == j
        lower = tl.load(lower_ptr + r * size + j, mask=r < size, other=0.0)
        root = tl.sum(tl.where(at_j, lower, 0.0), 0)
        below = tl.sum(tl.where((r > j)[:, None], lower[:, None] * y, 0.0), 0)
        solved = (tl.sum(tl.where(at_j[:, None], y, 0.0), 0) - below) / root
        y = tl.where(at_j[:, None], solved[None, :], y)
    tl.store(out_ptr + where, y, mask=inside)
