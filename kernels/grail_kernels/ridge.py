"""Ridge solves: (A + λI) x = rhs for a symmetric positive semidefinite A, by Cholesky.

Shapes: K unknowns, M right-hand sides, S problems.

Like LAPACK's xPOSVX: the matrix is equilibrated to a unit diagonal, factored once, and its condition number is
estimated from the factor (Hager 1984, Higham 1988; xLACON). Rounding in a Gram matrix is relative to
sqrt(A_ii A_jj), so the *equilibrated* condition is the one that says whether the smallest pivots are data or noise.
A factorisation that breaks down, or whose condition exceeds what A's own dtype can carry, is repeated with a tenfold
λ, from max(λ, 1e-8 mean(diag A)) up to mean(diag A) (up to 1 where that mean is not positive); every raise is counted
in the result.

Precision: float64 on CPU. On a GPU float64 while three float64 matrices of size K fit into half of the free memory,
else a float32 factor with two steps of refinement against residuals in float64. Many problems of K <= 128 on a GPU run
in one Triton kernel, in float32 with one step of refinement; those that fail there are solved one by one as above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import backend as choose_backend

FIRST_RAISE = 1e-8
NORM_ROWS = 1024
REFINEMENTS = 2
SMALL = 128
SMALL_PIVOT = 1e-6
"""The kernel's float32 answer is taken where no scaled pivot is smaller; below, rounding decides the pivot."""


class RidgeError(ArithmeticError):
    """A + λI could not be factored for any λ up to mean(diag A), or holds a NaN or infinity."""


@dataclass
class RidgeSolution:
    """`solution` [K, M] float64; `lam` the λ used; `info` the LAPACK info of the *first* attempt (0: fine,
    i > 0: pivot i was not positive, -1: factored, but singular to the precision of A); `retries` how often λ was
    raised; `rcond` reciprocal 1-norm condition of the equilibrated matrix that was solved (from the kernel for small
    problems: its smallest pivot, an upper bound of 1/‖(DAD)⁻¹‖). For S problems `solution` is [S, K, M] and each other
    field a list of length S."""

    solution: Tensor
    lam: float | list[float]
    info: int | list[int]
    retries: int | list[int]
    rcond: float | list[float]


def ridge_reference(a_KK: Tensor, rhs_KM: Tensor, lam: float, anchor_KM: Tensor | None = None) -> Tensor:
    """argmin_x tr(xᵀAx − 2xᵀrhs) + λ‖x − anchor‖², float64, by a dense LU solve: the specification."""
    a_KK, rhs_KM = a_KK.double(), rhs_KM.double()
    if anchor_KM is not None:
        rhs_KM = rhs_KM + lam * anchor_KM.double()
    eye = torch.eye(a_KK.shape[-1], dtype=torch.float64, device=a_KK.device)
    return torch.linalg.solve(a_KK + lam * eye, rhs_KM)


def ridge_solve(
    a: Tensor,
    rhs: Tensor,
    lam: float | Sequence[float] | Tensor,
    *,
    anchor: Tensor | None = None,
    backend: str | None = None,
    solve_dtype: torch.dtype | None = None,
) -> RidgeSolution:
    """Solve (A + λI) x = rhs, or with an anchor minimise the same problem plus λ‖x − anchor‖².

    a [K, K] or [S, K, K], symmetric, only read; rhs and anchor [K, M] or [S, K, M]; `lam` absolute, one number or S of
    them. Several λ with one a and rhs make a sweep: S solutions. With an anchor the answer is
    anchor + (A + λI)⁻¹(rhs − A anchor): for λ → ∞ the anchor itself. `solve_dtype` overrides the rule above.
    Raises RidgeError (naming the problem of a stack) when no λ up to mean(diag A) works, ValueError on shapes that do
    not fit.
    """
    if a.dim() not in (2, 3) or a.shape[-1] != a.shape[-2] or a.shape[:-1] != rhs.shape[:-1] or rhs.dim() != a.dim():
        raise ValueError(f"A {tuple(a.shape)} and right-hand side {tuple(rhs.shape)} do not fit")
    if anchor is not None and anchor.shape != rhs.shape:
        raise ValueError(f"anchor {tuple(anchor.shape)} and right-hand side {tuple(rhs.shape)} do not fit")
    lams = torch.as_tensor(lam, dtype=torch.float64).cpu()
    if lams.dim() > 1 or (a.dim() == 3 and lams.dim() == 1 and len(lams) != len(a)):
        raise ValueError(f"λ {tuple(lams.shape)} does not fit A {tuple(a.shape)}")
    if not bool((lams >= 0).all()):
        raise ValueError(f"λ must be a number >= 0, got {lam}")
    name = choose_backend("ridge", a.device, backend).name
    if a.dim() == 2 and lams.dim() == 0:
        return _solve(name, a, rhs, anchor, float(lams), solve_dtype)
    count = len(a) if a.dim() == 3 else len(lams)
    stack = [None if t is None else t.expand(count, *t.shape[-2:]) for t in (a, rhs, anchor)]
    return _solve_stack(name, *stack, lams.expand(count), solve_dtype)


def _solve_stack(
    name: str, a_SKK: Tensor, rhs_SKM: Tensor, anchor_SKM: Tensor | None, lam_S: Tensor, solve_dtype: torch.dtype | None
) -> RidgeSolution:
    """Each problem on its own; on a GPU the small ones first all at once."""
    count, size, _ = a_SKK.shape
    done: dict[int, RidgeSolution] = {}
    if name == "triton" and size <= SMALL:
        from .launch_packed import small_ridge

        solution, info, pivot = small_ridge(a_SKK, rhs_SKM, anchor_SKM, lam_S)
        for i in range(count):
            if not info[i] and pivot[i] >= SMALL_PIVOT and bool(torch.isfinite(solution[i]).all()):
                done[i] = RidgeSolution(solution[i], float(lam_S[i]), 0, 0, pivot[i])
    for i in range(count):
        if i not in done:
            anchor = None if anchor_SKM is None else anchor_SKM[i]
            try:
                done[i] = _solve(name, a_SKK[i], rhs_SKM[i], anchor, float(lam_S[i]), solve_dtype)
            except RidgeError as error:
                raise RidgeError(f"problem {i} of {count}: {error}") from error
    each = [done[i] for i in range(count)]
    solutions = [r.solution for r in each]
    return RidgeSolution(
        torch.stack(solutions) if each else rhs_SKM.double(),
        *([getattr(r, field) for r in each] for field in ("lam", "info", "retries", "rcond")),
    )


def _solve(
    name: str,
    a_KK: Tensor,
    rhs_KM: Tensor,
    anchor_KM: Tensor | None,
    lam: float,
    solve_dtype: torch.dtype | None = None,
) -> RidgeSolution:
    if name == "reference":
        return RidgeSolution(ridge_reference(a_KK, rhs_KM, lam, anchor_KM), lam, 0, 0, float("nan"))
    factor = _factor(a_KK, lam, solve_dtype or _solve_dtype(a_KK))
    rhs_KM = rhs_KM.double()
    if anchor_KM is not None:
        anchor_KM = anchor_KM.double()
        rhs_KM = rhs_KM - _product(a_KK, anchor_KM)
    x_KM = factor.solve(rhs_KM)
    if factor.lower_KK.dtype != torch.float64:
        for _ in range(REFINEMENTS):
            x_KM += factor.solve(rhs_KM - _product(a_KK, x_KM) - factor.lam * x_KM)
    if not torch.isfinite(x_KM).all():
        raise RidgeError("the solution is not finite: the right-hand side holds a NaN or infinity")
    if anchor_KM is not None:
        x_KM += anchor_KM
    return RidgeSolution(x_KM, factor.lam, factor.info, factor.retries, factor.rcond)


def _solve_dtype(a_KK: Tensor) -> torch.dtype:
    """The rule of the module's docstring."""
    if a_KK.device.type != "cuda":
        return torch.float64
    free, _ = torch.cuda.mem_get_info(a_KK.device)
    return torch.float64 if 3 * 8 * a_KK.shape[0] ** 2 <= free / 2 else torch.float32


def _product(a_KK: Tensor, x_KM: Tensor) -> Tensor:
    """A x in float64, by rows of A, so that A is never copied whole."""
    return torch.cat([rows.double() @ x_KM for rows in a_KK.split(NORM_ROWS)])


@dataclass
class _Factor:
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


def _factor(a_KK: Tensor, lam: float, dtype: torch.dtype) -> _Factor:
    """Factor A + λI in `dtype`, raising λ tenfold while the factorisation breaks down or is singular to the precision
    of A or of the factor."""
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
                return _Factor(lower_KK, scale_K, lam, first_info, retries, rcond)
            info = -1
        first_info = first_info or info
        if lam >= ceiling:
            raise RidgeError(f"A + λI is singular even at λ = {lam:.3g} (info {info}, rcond {rcond:.1e})")
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
