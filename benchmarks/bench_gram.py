"""Gram accumulation against what everybody writes, G += X.T @ X, in one run.

    pytest benchmarks/bench_gram.py --benchmark-only --benchmark-json=gram.json

`ratio` in extra_info is the median time of the full product over that of GramAccumulator.update (at most 2: half the
multiplications). Shapes of issue A: the MLP widths of SmolLM2-135M, a 4096-wide attention, and LLaMA-2-7B's MLP.
"""

import pytest
import torch

from benchmarks.timing import record, side_by_side
from grail_kernels import GramAccumulator, backend

SHAPES = {"smollm2-mlp": (8192, 1536), "attention-4096": (4096, 4096), "llama-2-7b-mlp": (2048, 11008)}


@pytest.mark.parametrize("shape", SHAPES)
def bench_gram_update(benchmark, shape):
    rows, width = SHAPES[shape]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x_TH = torch.randn(rows, width, device=device, generator=torch.Generator(device).manual_seed(0))
    full_HH = torch.zeros(width, width, device=device)
    accumulator = GramAccumulator(width, device=device)

    def full():
        full_HH.add_(x_TH.T @ x_TH)

    times = side_by_side({"full": full, "packed": lambda: accumulator.update(x_TH)})
    benchmark.pedantic(lambda: accumulator.update(x_TH), rounds=1)
    packed = accumulator.packed.data.numel() * 4
    record(
        benchmark,
        times,
        ratio=times["full"]["p50"] / times["packed"]["p50"],
        useful_gflops=rows * width * (width + 1) / times["packed"]["p50"] / 1e9,
        full_gflops=2 * rows * width**2 / times["full"]["p50"] / 1e9,
        packed_share_of_full=packed / (4 * width**2),
        backend=backend("gram", device).name,
    )
