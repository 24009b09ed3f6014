"""Ridge solves, shrinkage and exchanges of benchmarks/variants.py, float64 on plain tensors.

Shapes: H a site's width, K kept, R removed, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMP = 1e-3
"""Ridge of the greedy selections, a share of the mean diagonal."""


def damped_inverse(matrix: Tensor, damp: float) -> Tensor:
    """Of the matrix and a share of its mean diagonal."""
    diagonal = damp * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix + diagonal))


def ridge_solve(matrix: Tensor, right_OK: Tensor, ridge: float, scale: str = "mean") -> Tensor:
    """right (A + ridge · D)⁻¹, D the diagonal of A ("channel"), or its "mean" or "median" everywhere."""
    diagonal = matrix.diagonal()
    if scale != "channel":
        diagonal = (diagonal.mean() if scale == "mean" else diagonal.median()).expand(len(matrix))
    factor = torch.linalg.cholesky(matrix + torch.diag(ridge * diagonal))
    return torch.cholesky_solve(right_OK.mT, factor).mT


def left_over(kept: Tensor, weight: Tensor, gram: Tensor) -> float:
    """Σ‖W h − W' h_kept‖² of the best W'."""
    _, gone, schur = _parts(kept, weight, gram)
    return ((weight[:, gone] @ schur) * weight[:, gone]).sum().item()


def _parts(kept: Tensor, weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(W' [O, K], removed channels, the Schur complement of the kept ones)."""
    mask = torch.ones(len(gram), dtype=torch.bool)
    mask[kept] = False
    gone = mask.nonzero()[:, 0]
    predict = gram[gone][:, kept] @ damped_inverse(gram[kept][:, kept], DAMP)
    schur = gram[gone][:, gone] - predict @ gram[kept][:, gone]
    return weight[:, kept] + weight[:, gone] @ predict, gone, schur


def exchanged(kept: Tensor, weight: Tensor, gram: Tensor, step: int) -> Tensor:
    """The channels that gain most come back, those that then cost least go."""
    _, gone, schur = _parts(kept, weight, gram)
    gains = (weight[:, gone] @ schur).square().sum(0) / schur.diagonal().clamp(min=1e-30)
    more = torch.cat([kept, gone[gains.argsort(descending=True)[:step]]]).sort().values
    repaired, _, _ = _parts(more, weight, gram)
    costs = repaired.square().sum(0) / damped_inverse(gram[more][:, more], DAMP).diagonal()
    return more[costs.argsort(descending=True)[: len(kept)]].sort().values


def first_axes(mixed: Tensor, energy: Tensor) -> Tensor:
    """One α for the first axes and 0 for the others, as many as are best."""
    mixed_sums, energy_sums = mixed.cumsum(0), energy.cumsum(0)
    alphas = (mixed_sums / (energy_sums + 1e-30)).clamp(0, 1)
    count = (alphas.square() * energy_sums - 2 * alphas * mixed_sums).argmin().item()
    return torch.where(torch.arange(len(mixed)) <= count, alphas[count], 0.0)


def falling(mixed: Tensor, energy: Tensor) -> Tensor:
    """The best α for each axis that do not rise: neighbours that would are pooled."""
    pools: list[list[float]] = []
    for pair in zip(mixed.tolist(), energy.tolist(), strict=True):
        pools.append([*pair, 1])
        while len(pools) > 1 and pools[-1][0] * pools[-2][1] > pools[-2][0] * pools[-1][1]:
            last = pools.pop()
            pools[-1] = [a + b for a, b in zip(pools[-1], last, strict=True)]
    alphas = [torch.full((int(count),), m / (e + 1e-30), dtype=torch.float64) for m, e, count in pools]
    return torch.cat(alphas).clamp(0, 1)
