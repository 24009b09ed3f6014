"""Normal equations of the repair, block by block: their right-hand sides, the solve in place, and the rounded weight.

Shapes: O outputs, H width, K kept, M right-hand sides; B some outputs, R some rows. Whatever has O rows and is not the
result goes by blocks of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from grail_kernels import PackedSymmetric, RidgeError, RidgeSolution
from grail_kernels.cholesky import NOT_FINITE
from grail_kernels.ridge import MatrixRows, ridge_solve_

from .errors import GrailError
from .machine import trim_memory
from .reduction import Reduction

ANCHORED, PAPER = FORMS = ("anchored", "paper")
CPU_ROWS, GPU_ROWS = 512, 4096
"""Outputs that are handled at once; a GPU is idle with fewer."""
GRAM_ROWS = 256
"""Rows of a right-hand side that are gathered at once."""
NO_NUMBERS = "the Gram matrix or the weight holds NaN or infinity; check the checkpoint and the text"


def consumed(weight_OH: Tensor, gram: PackedSymmetric, reduction: Reduction, form: str) -> Tensor:
    """W(G Rᵀ − B0 A), or for the paper's form W G Rᵀ; float64 [O, K]."""
    out_OK = torch.zeros(len(weight_OH), reduction.kept_width, dtype=torch.float64, device=gram.device)
    for rows_R, block_RK in gathered(gram, reduction, form):
        out_OK.addmm_(weight_OH[:, rows_R.to(weight_OH.device)].double(), block_RK.double())
    return out_OK


def gathered(gram: PackedSymmetric, reduction: Reduction, form: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of G Rᵀ − B0 A that are not zero, or for the paper's form all of G Rᵀ: (which, int64 [R]; block [R, K])."""
    if form == "paper":
        for rows_R in torch.arange(reduction.width).split(GRAM_ROWS):
            yield rows_R, reduction.cross(gram, int(rows_R[0]), int(rows_R[-1]) + 1)
        return
    for start in range(0, reduction.residual_parts, GRAM_ROWS):
        yield reduction.residual(gram, start, start + GRAM_ROWS)


def blocks(weight_OX: Tensor) -> list[slice]:
    """Its rows, in blocks."""
    step = CPU_ROWS if weight_OX.device.type == "cpu" else GPU_ROWS
    return [slice(start, start + step) for start in range(0, len(weight_OX), step)]


def relative(ridge: float, diag_K: Tensor, name: str) -> float:
    mean = diag_K.mean().item()
    if not math.isfinite(mean):
        raise GrailError(f"{name}: {NO_NUMBERS}")
    return ridge * mean


def share_of(energy: float, total: float) -> float:
    """An error as a share; 0 of nothing, NaN where one of the two is too large for its sums."""
    if not (math.isfinite(energy) and math.isfinite(total)):
        return math.nan
    return max(energy / total, 0.0) if total > 0 else 0.0


def solve(a: MatrixRows, rhs_KM: Tensor, lam: float, name: str) -> RidgeSolution:
    """The solution is written over the right-hand side."""
    if not math.isfinite(lam):
        raise GrailError(f"{name}: --ridge times the mean square of its channels is beyond all numbers; give less")
    trim_memory(a.size**2)  # what making the right-hand side left free would lie beside A, the largest block of all
    try:
        return ridge_solve_(a, rhs_KM, lam)
    except RidgeError as error:
        if error.info == NOT_FINITE:
            raise GrailError(f"{name}: {NO_NUMBERS}") from error
        raise GrailError(f"{name}: the ridge solve failed: {error}; use more calibration text") from error


def rounded(wide: Callable[[slice], Tensor], weight_OX: Tensor, kept: int, dtype: torch.dtype, name: str) -> Tensor:
    """[O, K] in `dtype`, from float64 rows [B, K] that `wide` makes."""
    weight_OK = weight_OX.new_empty(len(weight_OX), kept, dtype=dtype)
    for outputs in blocks(weight_OX):
        weight_OK[outputs] = wide(outputs)
        if not torch.isfinite(weight_OK[outputs]).all():
            more = "use a wider --output-dtype or more --ridge"
            raise GrailError(f"{name}: the repaired weight overflows {dtype}; {more}")
    return weight_OK
