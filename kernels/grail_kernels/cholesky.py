"""One ridge system by Cholesky: equilibrated, its condition estimated, λ raised until the factor can be trusted.

Shapes: K unknowns, M right-hand sides. Like LAPACK's xPOSVX: the matrix is scaled to a unit diagonal, factored once,
and its condition number is estimated from the factor (Hager 1984, Higham 1988; xLACON). Rounding in a Gram matrix is
relative to sqrt(A_ii A_jj), so the *equilibrated* condition is the one that says whether the smallest pivots are data
or noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FIRST_RAISE = 1e-8
NORM_ROWS = 1024
REFINEMENTS = 2
SINGULAR, NOT_FINITE = -1, -2
"""`info` beyond LAPACK's: factored, but singular to the precision of A; a NaN or infinity."""


class RidgeError(ArithmeticError):
    """A + λI could not be factored for any λ up to mean(diag A), or something holds a NaN or infinity. `info` is that
    of the first attempt, `problem` the number of the (first) failed problem of a stack, else None."""

    def __init__(self, message: str, info: int = NOT_FINITE, problem: int | None = None):
        super().__init__(message)
        self.info, self.problem = info, problem


@dataclass
class Factor:
    """Cholesky factor L of the equilibrated D(A + λI)D, D = diag(scale)."""

    lower_KK: Tensor
    scale_K: Tensor
    lam: float
    info: int
    retries: int
    rcond: float

    def solve(self, rhs_KM: Tensor) -> Tensor:
        """(A + λI)⁻¹ rhs in the factor's precision, as float64."""
        x_KM = (self.scale_K[:, None] * rhs_KM).to(self.lower_KK.dtype)
        x_KM = torch.linalg.solve_triangular(self.lower_KK, x_KM, upper=False)
        x_KM = torch.linalg.solve_triangular(self.lower_KK.mT, x_KM, upper=True)
        return x_KM.double().mul_(self.scale_K[:, None])


def solve_one(
    a_KK: Tensor, rhs_KM: Tensor, anchor_KM: Tensor | None, lam: float, dtype: torch.dtype | None
) -> tuple[Tensor, Factor]:
    """(x [K, M] float64, the factor) of argmin tr(xᵀAx − 2xᵀrhs) + λ‖x − anchor‖²; `dtype` None: by the rule of
    `factor_dtype`. Raises RidgeError."""
    factor = factorise(a_KK, lam, dtype or factor_dtype(a_KK))
    rhs_KM = rhs_KM.double()
    if anchor_KM is not None:
        anchor_KM = anchor_KM.double()
        rhs_KM = rhs_KM - product(a_KK, anchor_KM)
    x_KM = factor.solve(rhs_KM)
    if factor.lower_KK.dtype != torch.float64:
        for _ in range(REFINEMENTS):
            x_KM += factor.solve(rhs_KM - product(a_KK, x_KM) - factor.lam * x_KM)
    if not torch.isfinite(x_KM).all():
        raise RidgeError("the solution is not finite: the right-hand side holds a NaN or infinity")
    if anchor_KM is not None:
        x_KM += anchor_KM
    return x_KM, factor


def factor_dtype(a_KK: Tensor) -> torch.dtype:
    """float64 on CPU, and on a GPU while three float64 matrices fit into half of the free memory; else float32."""
    if a_KK.device.type != "cuda":
        return torch.float64
    free, _ = torch.cuda.mem_get_info(a_KK.device)
    return torch.float64 if 3 * 8 * a_KK.shape[0] ** 2 <= free / 2 else torch.float32


def product(a_KK: Tensor, x_KM: Tensor) -> Tensor:
    """A x in float64, by rows of A, so that A is never copied whole."""
    return torch.cat([rows.double() @ x_KM for rows in a_KK.split(NORM_ROWS)])


def factorise(a_KK: Tensor, lam: float, dtype: torch.dtype) -> Factor:
    """Factor A + λI in `dtype`, raising λ tenfold, from max(λ, 1e-8 mean(diag A)) up to mean(diag A) (up to 1 where
    that mean is not positive), while the factorisation breaks down or is singular to the precision of A or of the
    factor. Raises RidgeError where no λ helps."""
    diag_K = a_KK.diagonal().double()
    mean = diag_K.mean().item()
    if not torch.isfinite(a_KK).all():
        raise RidgeError("the matrix holds a NaN or infinity")
    ceiling = mean if mean > 0 else 1.0
    floor = max(torch.finfo(a_KK.dtype).eps, torch.finfo(dtype).eps)
    retries, first_info = 0, 0
    while True:
        shifted_K = diag_K + lam
        scale_K = torch.where(shifted_K > 0, shifted_K, torch.ones_like(shifted_K)).rsqrt()
        work_KK = a_KK.to(dtype, copy=True)
        work_KK.diagonal().copy_(shifted_K)
        work_KK.mul_(scale_K[:, None].to(dtype)).mul_(scale_K.to(dtype))
        norm = max(rows.abs().sum(1).max().item() for rows in work_KK.split(NORM_ROWS))
        info_0 = torch.empty((), dtype=torch.int32, device=a_KK.device)
        torch.linalg.cholesky_ex(work_KK.mT, out=(work_KK.mT, info_0))
        lower_KK, info = work_KK.mT, int(info_0)
        rcond = 0.0
        if info == 0:
            rcond = 1.0 / (norm * _inverse_norm(lower_KK))
            if rcond >= floor:
                return Factor(lower_KK, scale_K, lam, first_info, retries, rcond)
            info = SINGULAR
        first_info = first_info or info
        if lam >= ceiling:
            message = f"A + λI is singular even at λ = {lam:.3g} (info {info}, rcond {rcond:.1e})"
            raise RidgeError(message, first_info)
        lam = min(max(lam * 10, FIRST_RAISE * ceiling), ceiling)
        retries += 1


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
