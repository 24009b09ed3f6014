"""The ridge solve of one site: A [K, K] and the smaller right-hand side, float64.

pytest benchmarks/bench_ridge.py --benchmark-only
"""

import pytest
import torch

from benchmarks.timing import record, side_by_side
from grail_kernels import ridge_reference, ridge_solve

SHAPES = {"smollm2-attention": (384, 192), "smollm2-mlp": (1075, 461), "llama-2-7b-attention": (2880, 1216)}


@pytest.mark.parametrize("shape", SHAPES)
def bench_ridge_solve(benchmark, shape):
    kept, columns = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * kept, kept, generator=generator)
    a_KK = x.T @ x
    rhs_KM = torch.randn(kept, columns, generator=generator)
    lam = 1e-3 * a_KK.diagonal().mean().item()
    calls = {
        "cholesky": lambda: ridge_solve(a_KK, rhs_KM, lam),
        "lu reference": lambda: ridge_reference(a_KK, rhs_KM, lam),
    }
    times = side_by_side(calls)
    benchmark.pedantic(calls["cholesky"], rounds=1)
    flops = kept**3 / 3 + 2 * kept**2 * columns
    record(
        benchmark,
        times,
        ratio=times["lu reference"]["p50"] / times["cholesky"]["p50"],
        gflops=flops / times["cholesky"]["p50"] / 1e9,
    )
