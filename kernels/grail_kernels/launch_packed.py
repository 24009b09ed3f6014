"""Launch the kernels on packed matrices and on stacks of small systems. Imported only when Triton is to run.

Shapes: S problems, K unknowns, M right-hand sides, R rows, C columns, H width.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import packed_triton, ridge_triton
from .configs import (
    MATMUL_BLOCK,
    MATMUL_COLUMNS,
    MATMUL_PRECISION,
    MATMUL_ROWS,
    PACKED_BLOCK,
    SCATTER_BLOCK,
    SMALL_COLUMNS,
    SMALL_ROWS,
)  # fmt: skip
from .launch import on_its_device


@on_its_device
def factor_stack(a_SKK: Tensor) -> Tensor:
    """Cholesky in place of S dense float32 matrices of K <= 128 with a unit diagonal; returns info [S] (LAPACK's)."""
    count, size, _ = a_SKK.shape
    info = torch.empty(count, dtype=torch.int32, device=a_SKK.device)
    ridge_triton.factor_kernel[(count,)](
        a_SKK, info, size, BLOCK_K=_small_block(size), BLOCK_P=SMALL_ROWS, num_warps=4, num_stages=1
    )
    return info


@on_its_device
def solve_stack(lower_SKK: Tensor, rhs_SKM: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ rhs for the factors of `factor_stack`, float32 [S, K, M]."""
    count, size, columns = rhs_SKM.shape
    out = torch.empty(count, size, columns, dtype=torch.float32, device=rhs_SKM.device)
    ridge_triton.solve_kernel[(count, -(-columns // SMALL_COLUMNS))](
        lower_SKK, rhs_SKM.contiguous(), out, size, columns,
        BLOCK_K=_small_block(size), BLOCK_M=SMALL_COLUMNS, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


def _small_block(size: int) -> int:
    return max(triton.next_power_of_2(size), SMALL_ROWS)


@on_its_device
def packed_gather(data: Tensor, tile: int, rows: Tensor, cols: Tensor, out: Tensor) -> None:
    """out [R, C] = G[rows][:, cols] of packed float32 numbers (padded layout); out has unit column stride."""
    grid = (-(-len(rows) // PACKED_BLOCK), -(-len(cols) // PACKED_BLOCK))
    packed_triton.gather_kernel[grid](
        data, rows, cols, out, len(rows), len(cols), out.stride(0), TILE=tile, BLOCK=PACKED_BLOCK
    )


@on_its_device
def packed_scatter(data: Tensor, tile: int, index: Tensor, values: Tensor) -> None:
    """G[index][:, index] = values (its lower triangle), in place."""
    blocks = -(-len(index) // SCATTER_BLOCK)
    packed_triton.scatter_kernel[(blocks, blocks)](
        data, index, values, len(index), values.stride(0), TILE=tile, BLOCK=SCATTER_BLOCK
    )


@on_its_device
def packed_matmul(data: Tensor, tile: int, dense_HM: Tensor) -> Tensor:
    """G @ dense [H, M], float32."""
    width, columns = dense_HM.shape
    out = torch.empty(width, columns, dtype=torch.float32, device=data.device)
    rows = min(MATMUL_BLOCK, tile)
    grid = (-(-width // rows), -(-columns // MATMUL_COLUMNS))
    packed_triton.matmul_kernel[grid](
        data, dense_HM.contiguous(), out, width, columns,
        TILE=tile, BLOCK_M=rows, BLOCK_N=MATMUL_COLUMNS, BLOCK_K=MATMUL_ROWS,
        PRECISION=MATMUL_PRECISION["hip" if torch.version.hip else "cuda"],
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
