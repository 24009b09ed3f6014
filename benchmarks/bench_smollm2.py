"""SmolLM2-135M from checkpoint to checkpoint: CPU and wall seconds, imports and evaluation excluded.

    python benchmarks/bench_smollm2.py                        # wanda-sp 0.3, 16 windows of 512 tokens, float32
    python benchmarks/bench_smollm2.py --dtype bfloat16       # forwards in bfloat16, where the CPU has it
    pytest benchmarks/bench_smollm2.py --benchmark-only

Each case is a process of its own. `scaled_cpu_seconds`: the CPU seconds if a plain float32 matrix product ran at
75 GFLOP/s per core, by the median of rates measured in the same process before every layer (not counted): on a shared
machine the rate swings by half from one second to the next. `wall_over_phases`: wall time over the
sum of the phases, below 1 where reading ahead and writing behind overlap with computing. `perplexity` comes from a
`grail eval` of its own. The script adds a line to benchmarks/results/smollm2_time.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

STORE = Path(__file__).parent / "results" / "smollm2_time.jsonl"
RATE = 75e9
SIZE = 2048
WINDOWS = 16


def measure(dtype: str, work: Path) -> dict:
    """One compression in this process, and what it took."""
    import torch

    import grail
    import grail.pipeline
    import grail.run
    from benchmarks.timing import environment
    from grail.checkpoint import reopen
    from grail.checkpoint.locate import SMOLLM2, locate
    from grail.families import open_family
    from grail.machine import gemm_rate
    from grail.report import versions

    open_family(locate(SMOLLM2).folder)  # unpacked once, on whichever run is the first; and everything is imported
    reopen.verify = lambda *_, **__: {}  # a process of its own; its time is that of importing
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    gemm_rate(cpu, size=SIZE)
    probes = [(gemm_rate(cpu, size=SIZE), 0.0, 0.0)]
    compress_layer = grail.pipeline._compress_layer

    def probed(*arguments):
        wall, used = time.perf_counter(), time.process_time()
        rate = gemm_rate(cpu, size=SIZE)
        probes.append((rate, time.perf_counter() - wall, time.process_time() - used))
        return compress_layer(*arguments)

    grail.pipeline._compress_layer = probed
    wall, used = time.perf_counter(), time.process_time()
    report = grail.compress(
        SMOLLM2, method="wanda-sp", ratio=0.3, target="hidden", samples=WINDOWS, seq_len=512, eval="none", dtype=dtype,
        output=str(work / "out"), overwrite=True,
    )  # fmt: skip
    wall, used = time.perf_counter() - wall, time.process_time() - used
    rate = statistics.median(rate for rate, _, _ in probes) / threads
    wall, used, compressing = (
        whole - sum(probe[i] for probe in probes) for whole, i in ((wall, 1), (used, 2), (report.phases["compress"], 1))
    )
    phases = report.profile.to_json()
    return {
        "dtype": dtype,
        "cpu_seconds": round(used, 2),
        "wall_seconds": round(wall, 2),
        "gflops_per_core": round(rate / 1e9, 1),
        "scaled_cpu_seconds": round(used * rate / RATE, 2),
        "wall_over_phases": round(compressing / sum(phase["seconds"] for phase in phases.values()), 3),
        "profile": phases,
        "versions": versions(),
        **environment(),
    }


def run(dtype: str) -> dict:
    """The same in a fresh process, and the perplexity of what it wrote."""
    with tempfile.TemporaryDirectory(prefix="grail-smollm2-") as work:
        script = [sys.executable, __file__, "--dtype", dtype, "--inside", work]
        root = Path(__file__).parents[1]
        environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}", "TQDM_DISABLE": "1"}
        environment["OMP_NUM_THREADS"] = environment.get("OMP_NUM_THREADS", "2")
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `grail` does
        done = subprocess.run(script, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        found = json.loads(done.stdout.splitlines()[-1])
        command = [sys.executable, "-m", "grail", "eval", f"{work}/out", "--data", "builtin", "--json", "-q"]
        told = json.loads(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout)
    return found | {"perplexity": next(iter(told["models"].values()))["perplexity"]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def bench_smollm2(benchmark, dtype):
    benchmark.extra_info.update(benchmark.pedantic(run, args=(dtype,), rounds=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside:
        sys.stdout.write(json.dumps(measure(asked.dtype, asked.inside)) + "\n")
        return
    found = run(asked.dtype)
    with open(STORE, "a") as handle:
        handle.write(json.dumps(found) + "\n")
    shown = ("dtype", "cpu_seconds", "scaled_cpu_seconds", "gflops_per_core", "wall_seconds", "wall_over_phases")
    sys.stdout.write("\n".join(f"{key:20} {found[key]}" for key in (*shown, "perplexity")) + "\n")


if __name__ == "__main__":
    main()
