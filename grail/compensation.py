"""The repair: a ridge solve absorbed into the consumer's weight; DESIGN section 1, GRAIL (CPAL 2026) equation for B.

Shapes: O outputs, H width, K kept, Q channels the reduction cannot reproduce, M right-hand sides; B some outputs.

Memory: A [K, K] and one right-hand side [K, M], both float64, are the only large things; A comes from the packed Gram
matrix by rows and is factored in place, the solution replaces the right-hand side, and whatever has O rows and is not
the result goes by blocks of them. `solve_bytes` is that in numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grail_kernels import PackedSymmetric
from grail_kernels.cholesky import block_rows
from grail_kernels.inputs import isolated
from grail_kernels.ridge import MatrixRows

from .moments import CrossMoments
from .normal_equations import CPU_ROWS, FORMS, blocks, consumed, gathered, relative, rounded, share_of, solve
from .reduction import Reduction, Selection
from .statistics import SiteStatistics

ALLOCATOR = 28 * 10**6
"""What the C library keeps of blocks that were freed (measured: 10 to 40 MB)."""


@dataclass
class Compensation:
    """`weight` [O, K] in the asked dtype (None once it is written), `bias` [O] float64 (None unless affine); λ as used
    (absolute), how often it was raised, the first LAPACK info, the reciprocal condition of the equilibrated system;
    error of the anchor and of `weight` (see `reconstruction_errors`; with an α the stream's, stream_repair.py), both
    with their best bias where affine. held_out: the same error on windows of their own, of the repair without the
    stream (α = 0) and of this one; None where nothing was to be chosen. effective_rank: (tr G)² / ‖G‖_F² of the Gram
    matrix, with a bias the scatter, that the repair used: that of the hidden vector where the compressed one is a slice
    of it, else of the compressed one; None where nothing was removed. sweeps: with several
    (stream_choice.py) α, λ, retries and held-out error of each; λ and α are then the first one's, retries those of
    all. raised: (λ asked, λ taken) of the first solve whose λ had to be raised, None where none had.
    stream_lam: λ of the part towards the stream, where it has equations of its own (networks in memory)."""

    weight: Tensor | None
    lam: float
    retries: int
    info: int
    rcond: float
    error_before: float
    error_after: float
    bias: Tensor | None = None
    alpha: float | None = None
    held_out: tuple[float, float] | None = None
    effective_rank: float | None = None
    sweeps: list[tuple[float, float, int, float | None]] | None = None
    raised: tuple[float, float] | None = None
    stream_lam: float | None = None


@isolated
def reconstruction_errors(
    weight_OH: Tensor, candidates: list[Tensor], reduction: Reduction, gram: PackedSymmetric
) -> list[float]:
    """Σ‖W x − W' R x‖² / Σ‖W x‖² over the rows behind the Gram matrix, for each candidate W' [O, K]; 0 where the
    consumer's output is all zero. With the scatter in the Gram matrix's place: both about their means."""
    return _errors(weight_OH, [weight_OK.__getitem__ for weight_OK in candidates], reduction, gram)[1]


@isolated
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
    lam = relative(ridge, reduction.normal_diagonal(gram), name) if lam is None else lam
    # W' first: what it took is free again when the errors are computed
    found = _repaired(weight_OH, gram, reduction, lam, form, name, dtype)
    found.effective_rank = gram.effective_rank()

    def lifted(outputs: slice) -> Tensor:
        return reduction.lift_consumer(weight_OH[outputs].double()).to(dtype)

    candidates = [lifted, found.weight.__getitem__]
    few = reduction.residual_rows <= reduction.kept_width
    if isinstance(reduction, Selection) and dtype == weight_OH.dtype and few:
        # W − W B0 R is W's removed columns, so that the anchor's error needs only their part of G; [Q, Q] float32 fits
        # where A was, but with many removed it would be the largest matrix of all
        found.error_before, (found.error_after,) = _errors(weight_OH, candidates[1:], reduction, gram, pruned=True)
    else:
        found.error_before, found.error_after = _errors(weight_OH, candidates, reduction, gram)[1]
    return found


def solve_bytes(outputs: int, width: int, kept: int) -> int:
    """Peak memory of `compensate` on a CPU beside its arguments: an anchored selection of `kept` of `width` channels,
    written in two bytes per number. Either A and the right-hand side are there and a block of rows is gathered, or, for
    few kept channels, the solution and the result and a block of outputs is written."""
    if kept == width:
        return 0
    solution = 8 * kept * min(outputs, width - kept)
    solve = 8 * kept**2 + 8 * kept * min(block_rows(kept), kept)
    write = 2 * outputs * kept + 2 * 8 * width * min(outputs, CPU_ROWS)
    return solution + max(solve, write) + ALLOCATOR


def solve_flops(outputs: int, width: int, kept: int) -> float:
    """Arithmetic of `compensate`: Cholesky, two triangular solves, and the product with what was removed."""
    gone = width - kept
    return kept**3 / 3 + 2.0 * kept**2 * min(outputs, gone) + 2.0 * outputs * gone * kept


@isolated
def compensate_pairs(
    anchor_OK: Tensor,
    pairs: CrossMoments,
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
    normal, channels = pairs.normal, torch.arange(pairs.normal.width)
    rhs_KO = pairs.cross.to(torch.float64, copy=True)
    if form == "paper":
        for outputs in blocks(anchor_OK):
            rhs_KO[:, outputs] += normal.matmul(anchor_OK[outputs].double().mT)
    lam = relative(ridge, normal.diagonal().double(), name)
    a = MatrixRows(normal.width, normal.device, lambda start, end: normal.gather(channels[start:end], channels))
    solved = solve(a, rhs_KO, lam, name)

    def wide(outputs: slice) -> Tensor:
        solution_BK = solved.solution.mT[outputs]
        return anchor_OK[outputs].double() + solution_BK if form == "anchored" else solution_BK

    weight_OK = rounded(wide, anchor_OK, normal.width, dtype or anchor_OK.dtype, name)
    found = Compensation(weight_OK, solved.lam, solved.retries, solved.info, solved.rcond, 0.0, 0.0)
    found.raised = (lam, solved.lam) if solved.retries else None
    found.effective_rank = normal.effective_rank()
    _judge_pairs(found, anchor_OK, pairs)
    return found


def mean_bias(
    weight_OH: Tensor, weight_OK: Tensor, reduction: Reduction, statistics: SiteStatistics, bias_O: Tensor | None
) -> Tensor:
    """b' = b + W μ − W' R μ, float64 [O]: the bias that keeps the mean output, for any W' (with W B0: FLAP's bias)."""
    mean_H = statistics.mean()
    mean_K = reduction.reduce(mean_H)
    parts = [weight_OH[rows].double() @ mean_H - weight_OK[rows].double() @ mean_K for rows in blocks(weight_OH)]
    return torch.cat(parts) if bias_O is None else torch.cat(parts) + bias_O.double()


def _repaired(
    weight_OH: Tensor, gram: PackedSymmetric, reduction: Reduction, lam: float, form: str, name: str, dtype: torch.dtype
) -> Compensation:
    """W' and how it was solved; the errors are left at 0."""
    few = form == "anchored" and reduction.residual_rows < len(weight_OH)
    if few:
        removed_Q, rhs_MK = _residual(gram, reduction)
    else:
        rhs_MK = consumed(weight_OH, gram, reduction, form)

    def read(start: int, end: int) -> Tensor:
        return reduction.normal_matrix(gram, start, end)

    solved = solve(MatrixRows(reduction.kept_width, gram.device, read), rhs_MK.mT, lam, name)

    def wide(outputs: slice) -> Tensor:
        if form == "paper":
            return rhs_MK[outputs]
        weight_BH = weight_OH[outputs].double()
        lifted_BK = reduction.lift_consumer(weight_BH)
        if few:
            return lifted_BK.addmm_(weight_BH.index_select(1, removed_Q.to(weight_BH.device)), rhs_MK)
        return lifted_BK.add_(rhs_MK[outputs])

    weight_OK = rounded(wide, weight_OH, reduction.kept_width, dtype, name)
    found = Compensation(weight_OK, solved.lam, solved.retries, solved.info, solved.rcond, 0.0, 0.0)
    found.raised = (lam, solved.lam) if solved.retries else None
    return found


def _residual(gram: PackedSymmetric, reduction: Reduction) -> tuple[Tensor, Tensor]:
    """(int64 [Q], float64 [Q, K]): the rows of G Rᵀ − B0 A that are not zero."""
    block_QK = torch.empty(reduction.residual_rows, reduction.kept_width, dtype=torch.float64, device=gram.device)
    rows, filled = [], 0
    for rows_R, block_RK in gathered(gram, reduction, "anchored"):
        block_QK[filled : filled + len(rows_R)] = block_RK
        rows.append(rows_R.to(gram.device))
        filled += len(rows_R)
    return torch.cat(rows), block_QK


def _errors(
    weight_OH: Tensor,
    candidates: list[Callable[[slice], Tensor]],
    reduction: Reduction,
    gram: PackedSymmetric,
    pruned: bool = False,
) -> tuple[float, list[float]]:
    """(With `pruned` the error of a plain selection, `reconstruction_errors` of candidates that give some of their rows
    [B, K] when asked)."""
    total, plain, energies = 0.0, 0.0, [0.0 for _ in candidates]
    gone = reduction.removed_channels.to(weight_OH.device) if pruned else None
    gram_QQ = gram.gather(gone, gone) if pruned else None
    for outputs in blocks(weight_OH):
        weight_BH = weight_OH[outputs].float()
        total += gram.quadratic_trace(weight_BH)
        if pruned:
            weight_BQ = weight_BH[:, gone]
            plain += torch.sum((weight_BQ @ gram_QQ) * weight_BQ, dtype=torch.float64).item()
        for i, candidate in enumerate(candidates):
            wide_BH = reduction.expand_consumer(candidate(outputs).float())
            energies[i] += gram.quadratic_trace(torch.sub(weight_BH, wide_BH, out=wide_BH))
    shares = [share_of(energy, total) for energy in (plain, *energies)]
    return shares[0], shares[1:]


def _judge_pairs(found: Compensation, anchor_OK: Tensor, pairs: CrossMoments) -> None:
    """Errors of the anchor and of what was found, and the bias of affine pairs."""
    cross_KO, before, total = pairs.cross, pairs.difference_energy, pairs.target_energy
    after, biases = before, []
    for outputs in blocks(anchor_OK):
        delta_BK = found.weight[outputs].double() - anchor_OK[outputs].double()
        after += pairs.normal.quadratic_trace(delta_BK) - 2 * torch.sum(delta_BK.mT * cross_KO[:, outputs]).item()
        if pairs.affine:
            biases.append(pairs.mean_difference[outputs] - delta_BK @ pairs.mean)
    found.error_before, found.error_after = (share_of(energy, total) for energy in (before, after))
    found.bias = torch.cat(biases) if pairs.affine else None
