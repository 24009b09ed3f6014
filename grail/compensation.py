"""The repair: a ridge solve absorbed into the consumer's weight; DESIGN section 1, GRAIL (CPAL 2026) equation for B.

Shapes: O outputs, H width, K kept, Q channels the reduction cannot reproduce.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grail_kernels import PackedSymmetric, RidgeError, RidgeSolution, ridge_solve

from .errors import GrailError
from .moments import PairStatistics
from .reduction import Reduction
from .statistics import SiteStatistics

FORMS = ("anchored", "paper")


@dataclass
class Compensation:
    """`weight` [O, K] in the asked dtype, `bias` [O] float64 (None unless affine); λ as used (absolute), how often it
    was raised, the first LAPACK info, the reciprocal condition of the equilibrated system; error of the anchor and of
    `weight` (see `reconstruction_errors`), both with their best bias where affine."""

    weight: Tensor
    lam: float
    retries: int
    info: int
    rcond: float
    error_before: float
    error_after: float
    bias: Tensor | None = None


def reconstruction_errors(
    weight_OH: Tensor, candidates: list[Tensor], reduction: Reduction, gram: PackedSymmetric
) -> list[float]:
    """Σ‖W x − W' R x‖² / Σ‖W x‖² over the rows behind the Gram matrix, for each candidate W' [O, K]; 0 where the
    consumer's output is all zero. With the scatter in the Gram matrix's place: both about their means."""
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
    lam: float | None = None,
    form: str = "anchored",
    name: str = "site",
    dtype: torch.dtype | None = None,
) -> Compensation:
    """W' such that W' (R x) ≈ W x on the data behind `gram`.

    anchored: W' = W B0 + W(G Rᵀ − B0 A)(A + λI)⁻¹; paper: W' = W G Rᵀ(A + λI)⁻¹;
    A = R G Rᵀ, λ = ridge · mean(diag A) unless `lam` gives it. For a fit with a bias `gram` is the scatter about the
    mean. Solved in float64; the errors are those of W' after rounding to `dtype` (default: the weight's).
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
    if lam is None:
        lam = ridge * normal_KK.diagonal().double().mean().item()
    if form == "anchored" and len(rows) < wide_OH.shape[0]:
        solved = _solve(normal_KK, residual_QK.mT, lam, name)
        delta_OK = source_OQ @ solved.solution.mT
    else:
        rhs_OK = source_OQ @ residual_QK.double()
        if form == "paper":
            rhs_OK += lifted_OK @ normal_KK.double()
        solved = _solve(normal_KK, rhs_OK.mT, lam, name)
        delta_OK = solved.solution.mT
    weight_OK = _rounded(delta_OK if form == "paper" else lifted_OK + delta_OK, dtype, name)
    before, after = reconstruction_errors(weight_OH, [lifted_OK.to(dtype), weight_OK], reduction, gram)
    return Compensation(weight_OK, solved.lam, solved.retries, solved.info, solved.rcond, before, after)


def compensate_pairs(
    anchor_OK: Tensor,
    pairs: PairStatistics,
    *,
    ridge: float = 1e-3,
    form: str = "anchored",
    name: str = "site",
    dtype: torch.dtype | None = None,
) -> Compensation:
    """W' such that W' z ≈ y for the pairs behind `pairs`, whose differences are d = y − W_a z of this anchor W_a.

    anchored: W' = W_a + Cᵀ(A + λI)⁻¹; paper: W' = (Cᵀ + W_a A)(A + λI)⁻¹; λ = ridge · mean(diag A).
    For a compressed hidden vector that is not a slice of the dense one (folding, optimised producers). With affine
    pairs the bias makes up the mean of what is left. Errors and GrailError as in `compensate`.
    """
    if form not in FORMS:
        raise ValueError(f"ridge form must be one of {FORMS}, got {form!r}")
    dtype = dtype or anchor_OK.dtype
    anchor_OK = anchor_OK.double()
    everything = torch.arange(pairs.normal.width)
    normal_KK = pairs.normal.gather(everything, everything)
    cross_KO = pairs.cross.double()
    lam = ridge * normal_KK.diagonal().double().mean().item()
    rhs_KO = cross_KO if form == "anchored" else cross_KO + normal_KK.double() @ anchor_OK.mT
    solved = _solve(normal_KK, rhs_KO, lam, name)
    wide_OK = solved.solution.mT + (anchor_OK if form == "anchored" else 0)
    weight_OK = _rounded(wide_OK, dtype, name)
    delta_OK = weight_OK.double() - anchor_OK
    before, total = pairs.difference_energy, pairs.target_energy
    after = before - 2 * torch.sum(delta_OK.mT * cross_KO).item() + pairs.normal.quadratic_trace(delta_OK)
    errors = [max(energy / total, 0.0) if total > 0 else 0.0 for energy in (before, after)]
    bias_O = pairs.mean_difference - delta_OK @ pairs.mean if pairs.affine else None
    return Compensation(weight_OK, solved.lam, solved.retries, solved.info, solved.rcond, *errors, bias_O)


def mean_bias(
    weight_OH: Tensor, weight_OK: Tensor, reduction: Reduction, statistics: SiteStatistics, bias_O: Tensor | None
) -> Tensor:
    """b' = b + W μ − W' R μ, float64 [O]: the bias that keeps the mean output, for any W' (with W B0: FLAP's bias)."""
    mean_H = statistics.mean()
    added_O = weight_OH.double() @ mean_H - weight_OK.double() @ reduction.reduce(mean_H)
    return added_O if bias_O is None else added_O + bias_O.double()


def _solve(normal_KK: Tensor, rhs_KM: Tensor, lam: float, name: str) -> RidgeSolution:
    if not torch.isfinite(normal_KK).all():
        raise GrailError(f"{name}: the Gram matrix holds NaN or infinity; check the checkpoint and the text")
    try:
        return ridge_solve(normal_KK, rhs_KM, lam)
    except RidgeError as error:
        raise GrailError(f"{name}: the ridge solve failed: {error}; use more calibration text") from error


def _rounded(weight_OK: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    weight_OK = weight_OK.to(dtype).contiguous()
    if not torch.isfinite(weight_OK).all():
        raise GrailError(f"{name}: the repaired weight overflows {dtype}; use a wider --output-dtype or more --ridge")
    return weight_OK
