"""The ridge solve of one site: A [K, K] and the smaller right-hand side, float64; and a stack of small ones, which runs
in the Triton kernels on a GPU and one by one on a CPU.

pytest benchmarks/bench_ridge.py --benchmark-only
"""

import pytest
import torch

from benchmarks.timing import record, side_by_side
from grail_kernels import backend, ridge_reference, ridge_solve

STACKS = {"heads": (32, 128, 64), "experts": (256, 64, 32)}
SHAPES = {"smollm2-attention": (384, 192), "smollm2-mlp": (1075, 461), "llama-2-7b-attention": (2880, 1216)}


@pytest.mark.parametrize("shape", SHAPES)
def bench_ridge_solve(benchmark, shape):
    kept, columns = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * kept, kept, generator=generator)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a_KK = (x.T @ x).to(device)
    rhs_KM = torch.randn(kept, columns, generator=generator).to(device)
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


@pytest.mark.parametrize("stack", STACKS)
def bench_ridge_stack(benchmark, stack):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count, kept, columns = STACKS[stack]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 2 * kept, kept, generator=generator)
    a_SKK, rhs_SKM = (x.mT @ x).to(device), torch.randn(count, kept, columns, generator=generator).to(device)
    calls = {
        "all at once": lambda: ridge_solve(a_SKK, rhs_SKM, 1e-3),
        "one by one": lambda: ridge_solve(a_SKK, rhs_SKM, 1e-3, backend="torch"),
    }
    times = side_by_side(calls)
    benchmark.pedantic(calls["all at once"], rounds=1)
    record(
        benchmark,
        times,
        ratio=times["one by one"]["p50"] / times["all at once"]["p50"],
        backend=backend("ridge", device).name,
    )
