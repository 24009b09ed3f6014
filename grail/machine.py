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
    """Largest resident memory of this process so far (VmHWM), in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
