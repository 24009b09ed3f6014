"""Gram accumulation against what everybody writes, G += X.T @ X, in one run.

    pytest benchmarks/bench_gram.py --benchmark-only --benchmark-json=gram.json

The same file runs on a CPU (float32, small) and on a GPU (bf16 and float32, full size). In extra_info: for each way the
seconds as p20, p50, p80 and the bytes needed meanwhile, `ratio` the full product's median over ours (2 is the limit:
half the multiplications), useful GFLOP/s of ours, and on a GPU `roofline` the fraction of half the measured rate of the
product alone.
Ways: `full` (BLAS or cuBLAS GEMM, added in float32), `product alone` (without the addition, GPU), `blocked` (a GEMM per
block row of a dense matrix, CPU), `packed` (ours), `centred` (ours about the mean), `ssyrk` (scipy, CPU, without
accumulation; its BLAS is OpenBLAS, torch's is not).
"""

import pytest
import torch
from scipy.linalg.blas import ssyrk

from benchmarks.timing import record, side_by_side
from grail_kernels import GramAccumulator, backend

SMALL = {"smollm2-mlp": (8192, 1536), "attention-4096": (4096, 4096), "llama-2-7b-mlp": (2048, 11008)}
FULL = {"smollm2-mlp": (65536, 1536), "attention-4096": (32768, 4096), "llama-2-7b-mlp": (32768, 11008)}
BLOCK = 512
CUDA = torch.cuda.is_available()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32] if CUDA else [torch.float32], ids=str)
@pytest.mark.parametrize("shape", SMALL)
def bench_gram_update(benchmark, shape, dtype):
    device = "cuda" if CUDA else "cpu"
    rows, width = (FULL if CUDA else SMALL)[shape]
    x_TH = torch.randn(rows, width, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    full_HH = torch.zeros(width, width, device=device)
    accumulator, centred = (GramAccumulator(width, device=device, centred=about_mean) for about_mean in (False, True))

    def blocked():
        for start in range(0, width, BLOCK):
            end = min(start + BLOCK, width)
            full_HH[start:end, :end] += x_TH[:, start:end].T @ x_TH[:, :end]

    wide = {"out_dtype": torch.float32} if dtype == torch.bfloat16 else {}
    calls = {
        "full": lambda: full_HH.add_(torch.mm(x_TH.T, x_TH, **wide)),
        **({"product alone": lambda: torch.mm(x_TH.T, x_TH, **wide)} if CUDA else {}),
        **({} if CUDA else {"blocked": blocked}),
        "packed": lambda: accumulator.update(x_TH),
        "centred": lambda: centred.update(x_TH),
    }
    times = side_by_side(calls)
    if not CUDA:
        # on its own: the threads of a second BLAS spin on after a call and would slow the others down
        x_fortran = x_TH.numpy().T
        times |= side_by_side({"ssyrk": lambda: ssyrk(1.0, x_fortran)}, rounds=3)
    benchmark.pedantic(calls["packed"], rounds=1)
    full, packed = times["full"]["p50"], times["packed"]["p50"]
    extra = {"roofline": times["product alone"]["p50"] / 2 / packed} if CUDA else {}
    record(
        benchmark,
        times,
        rows=rows,
        width=width,
        dtype=str(dtype),
        ratio=full / packed,
        useful_gflops=rows * width * (width + 1) / packed / 1e9,
        full_gflops=2 * rows * width**2 / full / 1e9,
        packed_share_of_full=accumulator.packed.data.numel() / width**2,
        backend=backend("gram", device).name,
        **extra,
    )
