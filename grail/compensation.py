"""The repair: a ridge solve absorbed into the consumer's weight; DESIGN section 1, GRAIL (CPAL 2026) equation for B.

Shapes: O outputs, H width, K kept, Q channels the reduction cannot reproduce.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grail_kernels import PackedSymmetric, RidgeError, ridge_solve

from .errors import GrailError
from .reduction import Reduction

FORMS = ("anchored", "paper")


@dataclass
class Compensation:
    """`weight` [O, K] in the asked dtype; λ as used (absolute), how often it was raised, the first LAPACK info, the
    reciprocal condition of the equilibrated system; error of the plain lift and of `weight` (see
    `reconstruction_errors`)."""

    weight: Tensor
    lam: float
    retries: int
    info: int
    rcond: float
    error_before: float
    error_after: float


def reconstruction_errors(
    weight_OH: Tensor, candidates: list[Tensor], reduction: Reduction, gram: PackedSymmetric
) -> list[float]:
    """Σ‖W x − W' R x‖² / Σ‖W x‖² over the rows behind the Gram matrix, for each candidate W' [O, K]; 0 where the
    consumer's output is all zero."""
    weight_OH = weight_OH.float()
    total = gram.quadratic_trace(weight_OH)
    if total <= 0:
        return [0.0 for _ in candidates]
    wide = (weight_OH - reduction.expand_consumer(weight_OK.float()) for weight_OK in candidates)
    return [max(gram.quadratic_trace(difference_OH) / total, 0.0) for difference_OH in wide]


def compensate(
    weight_OH: Tensor,
    gram: PackedSymmetric,
    reduction: Reduction,
    *,
    ridge: float = 1e-3,
    form: str = "anchored",
    name: str = "site",
    dtype: torch.dtype | None = None,
) -> Compensation:
    """W' such that W' (R x) ≈ W x on the data behind `gram`.

    anchored: W' = W B0 + W(G Rᵀ − B0 A)(A + λI)⁻¹; paper: W' = W G Rᵀ(A + λI)⁻¹;
    A = R G Rᵀ, λ = ridge · mean(diag A).
    Solved in float64; the errors are those of W' after rounding to `dtype` (default: the weight's).
    Raises GrailError naming the site when no λ up to mean(diag A) gives a usable factorisation.
    """
    if form not in FORMS:
        raise ValueError(f"ridge form must be one of {FORMS}, got {form!r}")
    if reduction.is_identity:
        return Compensation(weight_OH, 0.0, 0, 0, 1.0, 0.0, 0.0)
    dtype = dtype or weight_OH.dtype
    wide_OH = weight_OH.double()
    lifted_OK = reduction.lift_consumer(wide_OH)
    normal_KK = reduction.normal_matrix(gram)
    rows, residual_QK = reduction.residual(gram)
    source_OQ = wide_OH[:, rows.to(wide_OH.device)]
    if not torch.isfinite(normal_KK).all():
        raise GrailError(f"{name}: the Gram matrix holds NaN or infinity; check the checkpoint and the text")
    lam = ridge * normal_KK.diagonal().double().mean().item()
    try:
        if form == "anchored" and len(rows) < wide_OH.shape[0]:
            solved = ridge_solve(normal_KK, residual_QK.mT, lam)
            delta_OK = source_OQ @ solved.solution.mT
        else:
            rhs_OK = source_OQ @ residual_QK.double()
            if form == "paper":
                rhs_OK += lifted_OK @ normal_KK.double()
            solved = ridge_solve(normal_KK, rhs_OK.mT, lam)
            delta_OK = solved.solution.mT
    except RidgeError as error:
        raise GrailError(f"{name}: the ridge solve failed: {error}; use more calibration text") from error
    weight_OK = (delta_OK if form == "paper" else lifted_OK + delta_OK).to(dtype).contiguous()
    if not torch.isfinite(weight_OK).all():
        raise GrailError(f"{name}: the repaired weight overflows {dtype}; use a wider --output-dtype or more --ridge")
    before, after = reconstruction_errors(weight_OH, [lifted_OK.to(dtype), weight_OK], reduction, gram)
    return Compensation(weight_OK, solved.lam, solved.retries, solved.info, solved.rcond, before, after)
