"""Timing of several callables side by side, and what they ran on."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch

from grail.machine import peak_memory, reset_peak_memory


def side_by_side(calls: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, dict[str, float]]:
    """Seconds as p20, p50, p80 for each callable; one warm-up, then interleaved rounds, so that drift hits all."""
    reset_peak_memory()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(rounds + 1):
        for name, call in calls.items():
            synchronise()
            start = time.perf_counter()
            call()
            synchronise()
            if round_number:
                taken[name].append(time.perf_counter() - start)
    return {name: _percentiles(seconds) for name, seconds in taken.items()}


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def environment() -> dict:
    """Versions, device, threads and the peak memory since `side_by_side` began (all its callables together)."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
        "threads": torch.get_num_threads(),
        "peak_memory_bytes": peak_memory(),
    }


def record(benchmark, times: dict[str, dict[str, float]], **extra: object) -> None:
    """Put everything into pytest-benchmark's JSON."""
    benchmark.extra_info.update(times=times, **extra, **environment())


def _percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    at = lambda share: ordered[round(share * (len(ordered) - 1))]  # noqa: E731
    return {"p20": at(0.2), "p50": statistics.median(ordered), "p80": at(0.8)}
