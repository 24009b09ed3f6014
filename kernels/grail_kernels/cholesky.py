"""One ridge system by Cholesky: equilibrated, its condition estimated, λ raised until the factor can be trusted.

Shapes: K unknowns, M right-hand sides. Like LAPACK's xPOSVX: the matrix is scaled to a unit diagonal, factored once,
and its condition number is estimated from the factor (Hager 1984, Higham 1988; xLACON). Rounding in a Gram matrix is
relative to sqrt(A_ii A_jj), so the *equilibrated* condition is the one that says whether the smallest pivots are data
or noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .inputs import all_finite

FIRST_RAISE = 1e-8
REFINEMENTS = 2
BLOCK_ROWS, BLOCK_NUMBERS = 128, 1 << 19
"""A block of rows of A has about so many numbers, and at least so many rows: what a solve needs beside its matrices."""
SINGULAR, NOT_FINITE = -1, -2
"""`info` beyond LAPACK's: factored, but singular to the precision of A; a NaN or infinity."""


class RidgeError(ArithmeticError):
    """A + λI could not be factored for any λ up to mean(diag A), or something holds a NaN or infinity. `info` is that
    of the first attempt, `problem` the number of the (first) failed problem of a stack, else None."""

    def __init__(self, message: str, info: int = NOT_FINITE, problem: int | None = None):
        super().__init__(message)
        self.info, self.problem = info, problem


def block_rows(size: int) -> int:
    """Rows in which a matrix of `size` columns is read."""
    return max(BLOCK_NUMBERS // max(size, 1), BLOCK_ROWS)


@dataclass(frozen=True)
class MatrixRows:
    """A symmetric A [K, K], K = `size`, that is read by blocks of rows, as often as needed: nobody has to hold it.

    `read(start, end)` gives rows start..end, [end - start, K] on `device`, whose dtype says how precise A is.
    """

    size: int
    device: torch.device
    read: Callable[[int, int], Tensor]

    @classmethod
    def of(cls, a_KK: Tensor) -> MatrixRows:
        """Those of a dense matrix."""
        return cls(len(a_KK), a_KK.device, lambda start, end: a_KK[start:end])

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(which rows, the rows)."""
        step = block_rows(self.size)
        for start in range(0, self.size, step):
            end = min(start + step, self.size)
            yield slice(start, end), self.read(start, end)


@dataclass
class Factor:
    """Cholesky factor L of the equilibrated D(A + λI)D, D = diag(scale)."""

    lower_KK: Tensor
    scale_K: Tensor
    lam: float
    info: int
    retries: int
    rcond: float

    def solve_(self, rhs_KM: Tensor) -> Tensor:
        """(A + λI)⁻¹ rhs over rhs, float64, in the factor's precision; without further memory where that is float64
        and rhs or its transpose is contiguous."""
        rhs_KM.mul_(self.scale_K[:, None])
        x_KM = rhs_KM.to(self.lower_KK.dtype)
        torch.linalg.solve_triangular(self.lower_KK, x_KM, upper=False, out=x_KM)
        torch.linalg.solve_triangular(self.lower_KK.mT, x_KM, upper=True, out=x_KM)
        return rhs_KM.copy_(x_KM).mul_(self.scale_K[:, None])


def solve_one(
    a: MatrixRows, rhs_KM: Tensor, anchor_KM: Tensor | None, lam: float, dtype: torch.dtype | None
) -> tuple[Tensor, Factor]:
    """(x [K, M], the factor) of argmin tr(xᵀAx − 2xᵀrhs) + λ‖x − anchor‖². x is written over rhs, float64; `dtype`
    None: by the rule of `factor_dtype`. Raises RidgeError."""
    factor = factorise(a, lam, dtype or factor_dtype(a))
    if anchor_KM is not None:
        anchor_KM = anchor_KM.double()
        subtract_product(rhs_KM, a, anchor_KM)
    if factor.lower_KK.dtype == torch.float64:
        factor.solve_(rhs_KM)
    else:
        rhs_KM.copy_(_refined(factor, a, rhs_KM))
    if not all_finite(rhs_KM):
        raise RidgeError("the solution is not finite: the right-hand side holds a NaN or infinity")
    if anchor_KM is not None:
        rhs_KM += anchor_KM
    return rhs_KM, factor


def _refined(factor: Factor, a: MatrixRows, rhs_KM: Tensor) -> Tensor:
    """(A + λI)⁻¹ rhs from a float32 factor, its residuals in float64."""
    x_KM = factor.solve_(rhs_KM.clone())
    for _ in range(REFINEMENTS):
        left_KM = rhs_KM - factor.lam * x_KM
        subtract_product(left_KM, a, x_KM)
        x_KM += factor.solve_(left_KM)
    return x_KM


def factor_dtype(a: MatrixRows) -> torch.dtype:
    """float64 on CPU, and on a GPU while three float64 matrices fit into half of the free memory; else float32."""
    if a.device.type != "cuda":
        return torch.float64
    free, _ = torch.cuda.mem_get_info(a.device)
    return torch.float64 if 3 * 8 * a.size**2 <= free / 2 else torch.float32


def subtract_product(out_KM: Tensor, a: MatrixRows, x_KM: Tensor) -> None:
    """out −= A x in float64."""
    for rows, block_RK in a.blocks():
        out_KM[rows] -= block_RK.double() @ x_KM


def factorise(a: MatrixRows, lam: float, dtype: torch.dtype) -> Factor:
    """Factor A + λI in `dtype`, raising λ tenfold, from max(λ, 1e-8 mean(diag A)) up to mean(diag A) (up to 1 where
    that mean is not positive), while the factorisation breaks down or is singular to the precision of A or of the
    factor. The factor's is the only [K, K] memory: A is read anew for each λ. Raises RidgeError where no λ helps."""
    work_KK = torch.empty(a.size, a.size, dtype=dtype, device=a.device)
    retries, first_info = 0, 0
    while True:
        diag_K, epsilon = _fill(work_KK, a)
        mean = diag_K.mean().item()
        ceiling = mean if mean > 0 else 1.0
        scale_K, norm = _equilibrate(work_KK, diag_K + lam)
        info_0 = torch.empty((), dtype=torch.int32, device=a.device)
        torch.linalg.cholesky_ex(work_KK.mT, out=(work_KK.mT, info_0))
        lower_KK, info = work_KK.mT, int(info_0)
        rcond = 0.0
        if info == 0:
            rcond = 1.0 / (norm * _inverse_norm(lower_KK))
            if rcond >= max(epsilon, torch.finfo(dtype).eps):
                return Factor(lower_KK, scale_K, lam, first_info, retries, rcond)
            info = SINGULAR
        first_info = first_info or info
        if lam >= ceiling:
            message = f"A + λI is singular even at λ = {lam:.3g} (info {info}, rcond {rcond:.1e})"
            raise RidgeError(message, first_info)
        lam = min(max(lam * 10, FIRST_RAISE * ceiling), ceiling)
        retries += 1


def _fill(work_KK: Tensor, a: MatrixRows) -> tuple[Tensor, float]:
    """A into the work matrix: (its diagonal, float64 [K]; the relative precision of A). Raises RidgeError on NaN and
    infinity."""
    diag_K = torch.empty(a.size, dtype=torch.float64, device=a.device)
    for rows, block_RK in a.blocks():
        if not all_finite(block_RK):
            raise RidgeError("the matrix holds a NaN or infinity")
        work_KK[rows] = block_RK
        diag_K[rows] = block_RK[:, rows].diagonal()
    return diag_K, torch.finfo(block_RK.dtype).eps


def _equilibrate(work_KK: Tensor, shifted_K: Tensor) -> tuple[Tensor, float]:
    """Give the work matrix this diagonal and scale it to a unit one, in place: (scale, float64 [K]; its 1-norm)."""
    scale_K = torch.where(shifted_K > 0, shifted_K, torch.ones_like(shifted_K)).rsqrt()
    narrow_K, norm = scale_K.to(work_KK.dtype), 0.0
    work_KK.diagonal().copy_(shifted_K)
    step = block_rows(len(work_KK))
    for block_RK, scale_R in zip(work_KK.split(step), narrow_K.split(step), strict=True):
        block_RK.mul_(scale_R[:, None]).mul_(narrow_K)
        norm = max(norm, block_RK.abs().sum(1).max().item())
    return scale_K, norm


def _inverse_norm(lower_KK: Tensor, columns: int = 4, steps: int = 5) -> float:
    """Estimate ‖(L Lᵀ)⁻¹‖₁ from below, almost always within a factor 3.

    Higham and Tisseur's block version of Hager's method (SIAM J. Matrix Anal. Appl. 21, 2000), started from the usual
    vector of ones and from fixed random signs: the usual start alone is orthogonal to e_i - e_j, the null vector of
    two equal channels, which pruning meets more often than LAPACK's users do.
    """
    size = lower_KK.shape[0]

    def inverse(v_KM: Tensor) -> Tensor:
        v_KM = torch.linalg.solve_triangular(lower_KK, v_KM, upper=False)
        return torch.linalg.solve_triangular(lower_KK.mT, v_KM, upper=True)

    generator = torch.Generator().manual_seed(size)
    x_KM = torch.randn(size, min(columns, size), dtype=lower_KK.dtype, generator=generator).to(lower_KK.device)
    x_KM[:, 0] = 1.0
    x_KM /= x_KM.abs().sum(0)
    best, tried = 0.0, torch.zeros(size, dtype=torch.bool, device=lower_KK.device)
    for _ in range(steps):
        y_KM = inverse(x_KM)
        estimate = y_KM.abs().sum(0).max().item()
        if estimate <= best:
            break
        best = estimate
        gain_K = inverse(torch.where(y_KM >= 0, 1.0, -1.0).to(y_KM)).abs().amax(1).masked_fill(tried, 0.0)
        index = gain_K.topk(x_KM.shape[1]).indices
        tried[index] = True
        x_KM = torch.zeros_like(x_KM)
        x_KM[index, torch.arange(len(index), device=index.device)] = 1.0
    return best
