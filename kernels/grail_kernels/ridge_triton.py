"""Many small ridge problems at once: one program factors and solves one of them.

Shapes: S problems, K <= 128 unknowns, M right-hand sides. Heads, experts, or one matrix with a sweep of λ.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ridge_kernel(
    a_ptr, rhs_ptr, lam_ptr, work_ptr, out_ptr, info_ptr, pivot_ptr, size, columns, stride_a, stride_rhs,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Solve (A + λI) x = rhs by left-looking Cholesky of the matrix scaled to a unit diagonal.

    a [S, K, K] (stride_a 0: one matrix for all), rhs [S, K, M] (stride_rhs 0 likewise), lam [S], work [S, blocks of M,
    BLOCK_K, BLOCK_K] for the factor, out [S, K, M], all float32. info [S]: 0, or the first pivot (from 1) that was not
    positive, as LAPACK's xPOTRF. pivot [S]: smallest pivot of the scaled matrix. A bad problem spoils nobody else's
    answer. Grid: (S, blocks of M).

    The factor lives in global memory, a column at a time: a matrix of 128 in registers spills on every target.
    """
    problem = tl.program_id(0)
    base = problem.to(tl.int64)
    r = tl.arange(0, BLOCK_K)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rhs = (r < size)[:, None] & (m < columns)[None, :]
    a_ptr += base * stride_a
    lower_ptr = work_ptr + (base * tl.num_programs(1) + tl.program_id(1)) * BLOCK_K * BLOCK_K
    lam = tl.load(lam_ptr + problem)
    diagonal = tl.load(a_ptr + r * size + r, mask=r < size, other=1.0) + lam
    scale = tl.where(diagonal > 0, tl.rsqrt(tl.where(diagonal > 0, diagonal, 1.0)), 1.0)
    y = tl.load(rhs_ptr + base * stride_rhs + r[:, None] * columns + m[None, :], mask=in_rhs, other=0.0)
    y = y * scale[:, None]
    info = 0
    smallest = 1.0
    for j in range(0, size):
        at_j = r == j
        column = tl.load(a_ptr + r * size + j, mask=r < size, other=0.0) + tl.where(at_j, lam, 0.0)
        column = column * scale * tl.sum(tl.where(at_j, scale, 0.0), 0)
        for p0 in range(0, j, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            done = tl.load(lower_ptr + r[:, None] * BLOCK_K + p[None, :], mask=(p < j)[None, :], other=0.0)
            row = tl.load(lower_ptr + j * BLOCK_K + p, mask=p < j, other=0.0)
            column -= tl.sum(done * row[None, :], 1)
        pivot = tl.sum(tl.where(at_j, column, 0.0), 0)
        bad = (pivot <= 0) | (pivot != pivot)
        info = tl.where((info == 0) & bad, j + 1, info)
        smallest = tl.minimum(smallest, tl.where(bad, 0.0, pivot))
        root = tl.sqrt(tl.where(bad, 1.0, pivot))
        lower = tl.where(r > j, column / root, 0.0)
        tl.store(lower_ptr + r * BLOCK_K + j, tl.where(at_j, root, lower))
        tl.debug_barrier()
        solved = tl.sum(tl.where(at_j[:, None], y, 0.0), 0) / root
        y = tl.where(at_j[:, None], solved[None, :], y - lower[:, None] * solved[None, :])
    for step in range(0, size):
        j = size - 1 - step
        at_j = r == j
        lower = tl.load(lower_ptr + r * BLOCK_K + j)
        root = tl.sum(tl.where(at_j, lower, 0.0), 0)
        below = tl.sum(tl.where((r > j)[:, None], lower[:, None] * y, 0.0), 0)
        solved = (tl.sum(tl.where(at_j[:, None], y, 0.0), 0) - below) / root
        y = tl.where(at_j[:, None], solved[None, :], y)
    y = y * scale[:, None]
    tl.store(out_ptr + (base * size + r[:, None]) * columns + m[None, :], y, mask=in_rhs)
    if tl.program_id(1) == 0:
        tl.store(info_ptr + problem, info)
        tl.store(pivot_ptr + problem, smallest)
