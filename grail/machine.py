"""What this machine can do and what this process has used."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import resource
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from .errors import GrailError

GUESSED_DISK_RATE = 500e6
CPU_PRODUCT, GPU_PRODUCT = 896, 4096
"""Widths of the products that are measured: large enough for the rate, small enough to cost a CPU a tenth of a
second."""
TRIMMED = 2**24
"""With fewer numbers at work giving memory back is not worth the time."""
APART = 2**20
"""Smaller tensors stay where they are: the holes between them do not add up."""
TRIM_THRESHOLD, MMAP_THRESHOLD = (-1, 2**28), (-3, 2**25)
"""glibc's parameters by number: how much freed memory at the heap's end the library keeps, and from which size on a
block is a mapping of its own (the most that it takes)."""
ALLOCATION = ("MALLOC_TRIM_", "MALLOC_MMAP_", "GLIBC_TUNABLES")
"""What variables begin with that say what is given back."""
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def peak_memory() -> int:
    """Largest resident memory of this process (VmHWM) or of one of its finished children, or the largest CUDA
    allocation, whichever is more; bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return max(high_water(), children, device)


def high_water() -> int:
    """Largest resident memory of this process since it began, or since `reset_peak_memory`; bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM:") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory() -> None:
    """Start `high_water` of this process anew (Linux)."""
    refs = Path("/proc/self/clear_refs")
    with suppress(OSError):
        if refs.exists():
            refs.write_text("5")


def _status(key: str) -> int | None:
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return None


def trim_memory(numbers: int | None = None) -> None:
    """Have the C library give freed memory back to the system (glibc; elsewhere nothing happens): what lies between
    pieces still in use would otherwise pile up from layer to layer. numbers: of the tensors that are worked on, where
    few are not worth the time and their memory is kept for the next ones."""
    if numbers is not None and numbers <= TRIMMED:
        reuse_memory()
        return
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)


@functools.cache
def reuse_memory() -> None:
    """Have the C library keep what is freed for the next chunk, for the rest of the process (glibc, unless the
    environment says what is given back; elsewhere nothing happens). By itself it gives a chunk's activations back
    each time, and the system, which clears every page anew, then takes a tenth of all CPU time (SmolLM2; the peak of
    resident memory is the same)."""
    mallopt = getattr(_LIBC, "mallopt", None)
    if mallopt is not None and not any(name.startswith(ALLOCATION) for name in os.environ):
        for parameter, value in (TRIM_THRESHOLD, MMAP_THRESHOLD):
            mallopt(parameter, value)


def apart(tensor: Tensor) -> Tensor:
    """The same numbers in a mapping of their own (Linux; elsewhere, and off the CPU, the tensor itself), for what
    outlives the work it came from: left among short-lived blocks of the C library's heap it would pin them, and the
    heap would grow from layer to layer."""
    if _LIBC is None or tensor.device.type != "cpu" or tensor.nbytes < APART:
        return tensor
    pages = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


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


def resident_memory() -> int:
    """Resident memory of this process at this moment, bytes."""
    return _status("VmRSS:") or peak_memory()


def free_space(folder: Path) -> int:
    """Bytes that can be written under a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def disk_rate(folder: Path, size: int = 64 * 2**20) -> float:
    """Measured bytes a second of writing a file under a folder (or its nearest parent) and reading it again; through
    the system's cache, as the store is used. A guess where nothing may be written."""
    while not folder.exists():
        folder = folder.parent
    block = bytes(2**20)
    start = time.perf_counter()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for _ in range(size // len(block)):
                file.write(block)
            file.seek(0)
            while file.read(len(block)):
                pass
    except OSError:
        return GUESSED_DISK_RATE
    return 2 * size / (time.perf_counter() - start)


def gemm_rate(device: torch.device, dtype: torch.dtype = torch.float32, size: int | None = None) -> float:
    """Measured FLOP/s of a square matrix product, best of three."""
    size = size or (CPU_PRODUCT if device.type == "cpu" else GPU_PRODUCT)
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
