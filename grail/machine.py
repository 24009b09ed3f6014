"""What this machine can do and what this process has used."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

import torch

from .errors import GrailError


def peak_memory() -> int:
    """Largest resident memory of this process (VmHWM) or of one of its finished children, or the largest CUDA
    allocation, whichever is more; bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    own = _status("VmHWM:") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return max(own, children, device)


def reset_peak_memory() -> None:
    """Start `peak_memory` of this process anew (Linux), for benchmarks that share a process."""
    refs = Path("/proc/self/clear_refs")
    if refs.exists():
        refs.write_text("5")


def _status(key: str) -> int | None:
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return None


def available_memory() -> int:
    """Physical memory that can be had without swapping, in bytes (Linux: MemAvailable; else all of it)."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def usable_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one. Raises GrailError for one that cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else "not available"
        raise GrailError(f"--device {name} cannot be used here: {reason}") from error
    return device


def gemm_rate(device: torch.device, size: int = 1536) -> float:
    """Measured FLOP/s of a float32 matrix product, best of three."""
    a = torch.ones(size, size, device=device)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
