"""Timing of several callables side by side, and what they ran on."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable

import torch

from grail.machine import peak_memory, reset_peak_memory


def side_by_side(calls: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, dict[str, float]]:
    """Seconds as p20, p50, p80 for each callable; one warm-up, then interleaved rounds, so that drift hits all.
    `peak_bytes`: what its warm-up needed beyond what was held before (allocated on a GPU, resident on a CPU)."""
    peaks = {name: _peak(call) for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            synchronise()
            start = time.perf_counter()
            call()
            synchronise()
            taken[name].append(time.perf_counter() - start)
    return {name: _percentiles(seconds) | {"peak_bytes": peaks[name]} for name, seconds in taken.items()}


def _peak(call: Callable[[], object]) -> int:
    """Bytes that a call needs beyond what is held when it starts."""
    synchronise()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        reset_peak_memory()
        before = peak_memory()
    call()
    synchronise()
    after = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()
    return after - before


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def environment() -> dict:
    """Versions, device and threads."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "device": device,
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def record(benchmark, times: dict[str, dict[str, float]], **extra: object) -> None:
    """Put everything into pytest-benchmark's JSON."""
    benchmark.extra_info.update(times=times, **extra, **environment())


def _percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    at = lambda share: ordered[round(share * (len(ordered) - 1))]  # noqa: E731
    return {"p20": at(0.2), "p50": statistics.median(ordered), "p80": at(0.8)}
