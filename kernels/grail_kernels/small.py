"""Stacks of small ridge systems by the Triton kernels, and which of the answers can be trusted.

Shapes: S problems, K <= 128 unknowns, M right-hand sides.

The kernels factor and solve in float32; the matrices are formed and scaled to a unit diagonal in float64, and residuals
for the refinement are float64. An answer is taken where the first correction is small against the answer (the float32
factor is then good enough for two steps to converge) and the condition number, from the explicit inverse, is one that
A's dtype and float32 can carry. Memory: S K² numbers in float64 for A + λI and in float32 for the factor, twice that
for a moment while the inverse is formed (K = 128: 0.4 MB a problem), and four times S K M numbers in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .cholesky import REFINEMENTS

LARGEST = 128
LARGEST_CORRECTION = 1e-3


class SmallSolutions(NamedTuple):
    """`solution` [S, K, M] float64; `info` as LAPACK's xPOTRF; `rcond` reciprocal 1-norm condition of the equilibrated
    matrix (0 where it was not factored); `accepted`: the solution is good."""

    solution: Tensor
    info: list[int]
    rcond: list[float]
    accepted: list[bool]


def solve_small(a_SKK: Tensor, rhs_SKM: Tensor, anchor_SKM: Tensor | None, lam_S: Tensor) -> SmallSolutions:
    """Solve S problems at once; a and rhs may be expanded along S. One transfer from the device at the end."""
    from .launch_packed import factor_stack, solve_stack

    system_SKK, rhs_SKM = a_SKK.double(), rhs_SKM.double()
    if anchor_SKM is not None:
        rhs_SKM = rhs_SKM - system_SKK @ anchor_SKM.double()
    system_SKK = system_SKK.clone()  # never the caller's, nor one matrix expanded along S
    system_SKK.diagonal(dim1=1, dim2=2).add_(lam_S.to(a_SKK.device)[:, None])
    diagonal_SK = system_SKK.diagonal(dim1=1, dim2=2)
    scale_SK = torch.where(diagonal_SK > 0, diagonal_SK, torch.ones_like(diagonal_SK)).rsqrt()
    lower_SKK = (scale_SK[:, :, None] * system_SKK * scale_SK[:, None, :]).float().contiguous()
    norm_S = lower_SKK.abs().sum(2).amax(1)
    info_S = factor_stack(lower_SKK)
    eye_SKK = torch.eye(a_SKK.shape[1], dtype=torch.float32, device=a_SKK.device).expand_as(lower_SKK)
    rcond_S = 1.0 / (norm_S * solve_stack(lower_SKK, eye_SKK).abs().sum(2).amax(1))

    def solve(rhs_SKM: Tensor) -> Tensor:
        return solve_stack(lower_SKK, (scale_SK[:, :, None] * rhs_SKM).float()).double() * scale_SK[:, :, None]

    def size_of(x_SKM: Tensor) -> Tensor:
        return (x_SKM / scale_SK[:, :, None]).norm(dim=1)

    x_SKM, converges_S = solve(rhs_SKM), None
    for _ in range(REFINEMENTS):
        correction_SKM = solve(rhs_SKM - system_SKK @ x_SKM)
        if converges_S is None:
            converges_S = (size_of(correction_SKM) <= LARGEST_CORRECTION * size_of(x_SKM)).all(1)
        x_SKM = x_SKM + correction_SKM
    finite_S = torch.isfinite(x_SKM).flatten(1).all(1)
    floor = max(torch.finfo(a_SKK.dtype).eps, torch.finfo(torch.float32).eps)
    accepted_S = (info_S == 0) & converges_S & finite_S & (rcond_S >= floor)
    if anchor_SKM is not None:
        x_SKM = x_SKM + anchor_SKM.double()
    rcond_S = torch.where(info_S == 0, rcond_S.double(), 0.0)
    info, rcond, accepted = torch.stack([info_S.double(), rcond_S, accepted_S.double()]).tolist()
    return SmallSolutions(x_SKM, [int(i) for i in info], rcond, [bool(a) for a in accepted])
