"""Ridge solves: (A + λI) x = rhs for a symmetric positive semidefinite A, alone or many at once.

Shapes: K unknowns, M right-hand sides, S problems.

A factorisation that breaks down, or whose condition exceeds what A's own dtype can carry, is repeated with a tenfold
λ (cholesky.py); every raise is counted in the result. Precision: float64 on CPU. On a GPU float64 while three float64
matrices of size K fit into half of the free memory, else a float32 factor with two steps of refinement against
residuals in float64. Many problems of K <= 128 on a GPU run in Triton kernels (small.py), in float32 with the same
refinement; those whose answer cannot be trusted there are solved one by one as above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cholesky import NOT_FINITE, SINGULAR, MatrixRows, RidgeError, solve_one
from .dispatch import backend as choose_backend
from .inputs import isolated, overlaps, plain

__all__ = ["MatrixRows", "RidgeError", "RidgeSolution", "ridge_reference", "ridge_solve", "ridge_solve_"]
ON_ERROR = ("raise", "report")


@dataclass
class RidgeSolution:
    """`solution` [K, M] float64; `lam` the λ used; `info` the LAPACK info of the *first* attempt (0: fine,
    i > 0: pivot i was not positive, -1: factored, but singular to the precision of A, -2: A, the right-hand side or the
    anchor holds a NaN or infinity); `retries` how often λ was raised; `rcond` reciprocal 1-norm condition of the
    equilibrated matrix that was solved. For S problems `solution` is [S, K, M] and each other field a list of length S.
    With on_error="report" a problem without an answer has a NaN solution, info other than 0, and NaN λ and rcond."""

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


@isolated
def ridge_solve(
    a: Tensor,
    rhs: Tensor,
    lam: float | Sequence[float] | Tensor,
    *,
    anchor: Tensor | None = None,
    backend: str | None = None,
    solve_dtype: torch.dtype | None = None,
    on_error: str = "raise",
) -> RidgeSolution:
    """Solve (A + λI) x = rhs, or with an anchor minimise the same problem plus λ‖x − anchor‖².

    a [K, K] or [S, K, K], symmetric, floating point, only read; rhs and anchor [K, M] or [S, K, M]; `lam` absolute, one
    number or S of them. Several λ with one a and rhs make a sweep: S solutions. With an anchor the answer is
    anchor + (A + λI)⁻¹(rhs − A anchor): for λ → ∞ the anchor itself. `solve_dtype` (float32 or float64) overrides the
    rule above, also for small problems. No argument is changed; `ridge_solve_` needs less memory.
    Every problem of a stack is solved, whatever becomes of its neighbours. Then, where no λ up to mean(diag A) worked
    for some: `on_error="raise"` raises RidgeError naming the first of them, "report" marks them (see RidgeSolution).
    Raises ValueError on shapes and devices that do not fit, TypeError on dtypes and on what is no dense tensor.
    """
    devices = {matrix.device for matrix in (a, rhs, anchor) if isinstance(matrix, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"the matrices are on different devices: {' and '.join(map(str, devices))}")
    a, rhs = plain("A", a), plain("the right-hand side", rhs)
    anchor = None if anchor is None else plain("the anchor", anchor)
    if a.dim() not in (2, 3) or a.shape[-1] != a.shape[-2] or a.shape[:-1] != rhs.shape[:-1] or rhs.dim() != a.dim():
        raise ValueError(f"A {tuple(a.shape)} and right-hand side {tuple(rhs.shape)} do not fit")
    if anchor is not None and anchor.shape != rhs.shape:
        raise ValueError(f"anchor {tuple(anchor.shape)} and right-hand side {tuple(rhs.shape)} do not fit")
    given = [a, rhs] if anchor is None else [a, rhs, anchor]
    if not all(matrix.is_floating_point() for matrix in given):
        raise TypeError(f"expected floating-point matrices, got {' and '.join(str(t.dtype) for t in given)}")
    if a.itemsize == 1:
        raise TypeError(f"A is {a.dtype}, in which no system can be solved; give at least 16 bits")
    lams = _checked_ridge(lam)
    if lams.dim() > 1 or (a.dim() == 3 and lams.dim() == 1 and len(lams) != len(a)):
        raise ValueError(f"λ {tuple(lams.shape)} does not fit A {tuple(a.shape)}")
    if on_error not in ON_ERROR or solve_dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"on_error {on_error!r} (of {ON_ERROR}) or solve_dtype {solve_dtype} is not known")
    name = choose_backend("ridge", a.device, backend).name
    if a.dim() == 2 and lams.dim() == 0:
        solved, error = _attempt(name, MatrixRows.of(a), _owned(rhs), anchor, float(lams), solve_dtype)
        if error is not None and on_error == "raise":
            raise error
        return solved
    count = len(a) if a.dim() == 3 else len(lams)
    a, rhs, anchor = _stacked(a, count), _stacked(rhs, count), None if anchor is None else _stacked(anchor, count)
    return _solve_stack(name, a, rhs, anchor, lams.expand(count), solve_dtype, on_error)


@isolated
def ridge_solve_(a: MatrixRows, rhs_KM: Tensor, lam: float, *, backend: str | None = None) -> RidgeSolution:
    """`ridge_solve` of one problem for sizes where a second matrix is too many: the solution is written over `rhs_KM`.

    A is read by rows into the one float64 [K, K] buffer that there is (where the rule above takes float32, that and two
    more right-hand sides), factored there, and read anew whenever λ is raised. `rhs_KM` is float64 [K, M] on A's
    device, best with itself or its transpose contiguous, else it is copied; its values are lost when RidgeError is
    raised. Raises ValueError for another shape, dtype or device, where two of its elements are one number in memory,
    and for more than one λ.
    """
    if rhs_KM.requires_grad:
        rhs_KM = rhs_KM.detach()
    if rhs_KM.dim() != 2 or len(rhs_KM) != a.size or rhs_KM.dtype != torch.float64 or rhs_KM.device != a.device:
        wanted = f"float64 with {a.size} rows on {a.device}"
        raise ValueError(f"right-hand side {tuple(rhs_KM.shape)}, {rhs_KM.dtype} on {rhs_KM.device}: expected {wanted}")
    if overlaps(rhs_KM):
        raise ValueError(f"elements of the right-hand side share memory (strides {list(rhs_KM.stride())}): clone it")
    lams = _checked_ridge(lam)
    if lams.dim():
        raise ValueError(f"one problem takes one λ, got {lam}")
    name = choose_backend("ridge", a.device, backend).name
    solved, error = _attempt(name, a, rhs_KM, None, float(lams), None)
    if error is not None:
        raise error
    return solved


def _stacked(matrix: Tensor, count: int) -> Tensor:
    return matrix.expand(count, *matrix.shape[-2:])


def _checked_ridge(lam: float | Sequence[float] | Tensor) -> Tensor:
    try:
        lams = torch.as_tensor(lam, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"λ must be a number, or one for each problem, got {lam!r}") from error
    if not bool(((lams >= 0) & (lams < float("inf"))).all()):
        raise ValueError(f"λ must be a finite number >= 0, got {lam}")
    return lams


def _solve_stack(
    name: str, a_SKK: Tensor, rhs_SKM: Tensor, anchor_SKM: Tensor | None, lam_S: Tensor,
    solve_dtype: torch.dtype | None, on_error: str,
) -> RidgeSolution:  # fmt: skip
    """Each problem on its own; on a GPU the small ones first all at once."""
    count = len(a_SKK)
    done, errors = _by_kernel(name, a_SKK, rhs_SKM, anchor_SKM, lam_S, solve_dtype), {}
    for i in range(count):
        if i not in done:
            anchor = None if anchor_SKM is None else anchor_SKM[i]
            rows, rhs_KM = MatrixRows.of(a_SKK[i]), _owned(rhs_SKM[i])
            done[i], error = _attempt(name, rows, rhs_KM, anchor, float(lam_S[i]), solve_dtype)
            if error is not None:
                errors[i] = error
    if errors and on_error == "raise":
        i, error = next(iter(errors.items()))
        more = f" ({len(errors)} problems failed)" if len(errors) > 1 else ""
        raise RidgeError(f"problem {i} of {count}: {error}{more}", error.info, i) from error
    each = [done[i] for i in range(count)]
    return RidgeSolution(
        torch.stack([r.solution for r in each]) if each else rhs_SKM.double(),
        *([getattr(r, field) for r in each] for field in ("lam", "info", "retries", "rcond")),
    )


def _by_kernel(
    name: str, a_SKK: Tensor, rhs_SKM: Tensor, anchor_SKM: Tensor | None, lam_S: Tensor,
    solve_dtype: torch.dtype | None,
) -> dict[int, RidgeSolution]:  # fmt: skip
    """Those answers of the small-problem kernels that can be trusted."""
    from .small import LARGEST, solve_small

    if name != "triton" or solve_dtype is not None or a_SKK.shape[1] > LARGEST or not rhs_SKM.numel():
        return {}
    small = solve_small(a_SKK, rhs_SKM, anchor_SKM, lam_S)
    return {
        i: RidgeSolution(small.solution[i], float(lam_S[i]), 0, 0, small.rcond[i])
        for i, accepted in enumerate(small.accepted)
        if accepted
    }


def _owned(rhs_KM: Tensor) -> Tensor:
    return rhs_KM.to(torch.float64, copy=True)


def _attempt(
    name: str, a: MatrixRows, rhs_KM: Tensor, anchor_KM: Tensor | None, lam: float, dtype: torch.dtype | None
) -> tuple[RidgeSolution, RidgeError | None]:
    """One problem, its answer over rhs_KM (float64); or a NaN one and the error."""
    try:
        if not a.size:
            return RidgeSolution(rhs_KM, lam, 0, 0, 1.0), None
        if name == "reference":
            x_KM = rhs_KM.copy_(_checked_reference(a.read(0, a.size), rhs_KM, lam, anchor_KM))
            return RidgeSolution(x_KM, lam, 0, 0, float("nan")), None
        x_KM, factor = solve_one(a, rhs_KM, anchor_KM, lam, dtype)
        return RidgeSolution(x_KM, factor.lam, factor.info, factor.retries, factor.rcond), None
    except RidgeError as error:
        return RidgeSolution(rhs_KM.fill_(float("nan")), float("nan"), error.info, 0, float("nan")), error


def _checked_reference(a_KK: Tensor, rhs_KM: Tensor, lam: float, anchor_KM: Tensor | None) -> Tensor:
    if not all(bool(torch.isfinite(t).all()) for t in (a_KK, rhs_KM, anchor_KM) if t is not None):
        raise RidgeError("the input holds a NaN or infinity", NOT_FINITE)
    try:
        return ridge_reference(a_KK, rhs_KM, lam, anchor_KM)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # torch does not list it in __all__
        raise RidgeError(f"the reference raises no λ: {error}", SINGULAR) from error
