"""Launch the kernels on packed matrices and on stacks of small ridge problems. Imported only when Triton is to run.

Shapes: S problems, K unknowns, M right-hand sides, R rows, C columns, H width.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import packed_triton, ridge_triton
from .configs import MATMUL_PRECISION, MATMUL_ROWS, PACKED_BLOCK, SCATTER_BLOCK, SMALL_COLUMNS, SMALL_ROWS
from .launch import on_its_device


@on_its_device
def small_ridge(
    a_SKK: Tensor, rhs_SKM: Tensor, anchor_SKM: Tensor | None, lam_S: Tensor
) -> tuple[Tensor, list[int], list[float]]:
    """(solution [S, K, M] float64, info, smallest scaled pivot) of S problems with K <= 128; a and rhs may be expanded
    along S. One step of refinement against the float64 residual."""
    lam = lam_S.to(a_SKK.device)
    target = rhs_SKM.double()
    if anchor_SKM is not None:
        target = target - a_SKK.double() @ anchor_SKM.double()
    a32 = _dense_rows(a_SKK.float())
    x_SKM, info, pivot = _small_ridge_once(a32, target.float(), lam.float())
    x_SKM = x_SKM.double()
    residual = target - a_SKK.double() @ x_SKM - lam[:, None, None] * x_SKM
    x_SKM += _small_ridge_once(a32, residual.float(), lam.float())[0]
    if anchor_SKM is not None:
        x_SKM += anchor_SKM.double()
    return x_SKM, info.tolist(), pivot.tolist()


def _small_ridge_once(a_SKK: Tensor, rhs_SKM: Tensor, lam_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    count, size, columns = rhs_SKM.shape
    rhs_SKM = _dense_rows(rhs_SKM)
    out = torch.empty(count, size, columns, dtype=torch.float32, device=a_SKK.device)
    info = torch.empty(count, dtype=torch.int32, device=a_SKK.device)
    pivot = torch.empty(count, dtype=torch.float32, device=a_SKK.device)
    block, column_blocks = max(triton.next_power_of_2(size), SMALL_ROWS), -(-columns // SMALL_COLUMNS)
    work = torch.empty(count, column_blocks, block, block, dtype=torch.float32, device=a_SKK.device)
    ridge_triton.ridge_kernel[(count, column_blocks)](
        a_SKK, rhs_SKM, lam_S.contiguous(), work, out, info, pivot, size, columns, a_SKK.stride(0), rhs_SKM.stride(0),
        BLOCK_K=block, BLOCK_M=SMALL_COLUMNS, BLOCK_P=SMALL_ROWS, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out, info, pivot


def _dense_rows(stack: Tensor) -> Tensor:
    """The same stack with dense matrices; one that is expanded along S (stride 0) stays so."""
    if stack.stride(0) == 0:
        return stack[:1].contiguous().expand_as(stack)
    return stack.contiguous()


@on_its_device
def packed_gather(data: Tensor, tile: int, rows: Tensor, cols: Tensor, out: Tensor) -> None:
    """out [R, C] = G[rows][:, cols] of packed numbers (padded layout); out has unit column stride."""
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
    grid = (-(-width // tile), -(-columns // PACKED_BLOCK))
    packed_triton.matmul_kernel[grid](
        data, dense_HM, out, width, columns, dense_HM.stride(0), dense_HM.stride(1),
        TILE=tile, BLOCK_N=PACKED_BLOCK, BLOCK_K=MATMUL_ROWS,
        PRECISION=MATMUL_PRECISION["hip" if torch.version.hip else "cuda"],
        num_warps=8, num_stages=2,
    )  # fmt: skip
    return out
