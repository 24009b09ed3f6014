"""Where time and memory go, phase by phase."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .machine import high_water, reset_peak_memory


@dataclass
class Phase:
    """Seconds of wall time and of CPU time of all threads, floating-point operations, bytes moved, how often, and the
    largest resident memory within (0: not watched)."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    count: int = 0
    peak: int = 0

    def to_json(self) -> dict[str, float | None]:
        """Rounded, with the rates achieved where something was counted."""
        seconds = max(self.seconds, 1e-9)
        return {
            "seconds": round(self.seconds, 3),
            "cpu_seconds": round(self.cpu_seconds, 3),
            "gflops": round(self.flops / seconds / 1e9, 2) if self.flops else None,
            "gbps": round(self.bytes / seconds / 1e9, 3) if self.bytes else None,
            "count": self.count,
            "peak_memory_bytes": self.peak or None,
        }


class Profile:
    """Times by phase name. A phase within a phase is taken out of the outer one, so that the seconds of one thread add
    up; phases of background threads overlap with those of the main one. watch_memory: also each phase's own peak
    (Linux), for which the process's high-water mark is set back again and again; `peak` is then the largest of all."""

    def __init__(self, watch_memory: bool = False):
        self.phases: dict[str, Phase] = {}
        self.peak = 0
        self._watches = watch_memory
        self._open = threading.local()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """What was found: a report that holds it can be pickled."""
        return {"phases": self.phases, "peak": self.peak, "_watches": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__ |= state

    @contextmanager
    def phase(self, name: str, *, flops: float = 0.0, bytes: float = 0.0) -> Iterator[Phase]:
        """Add what happens within to the phase of that name; what is counted within may be added to what is yielded."""
        counted = Phase(flops=flops, bytes=bytes)
        stack: list[Phase] = self._open.__dict__.setdefault("stack", [])
        self._note_memory(stack)
        stack.append(inner := Phase())
        self._finish_kernels()
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield counted
        finally:
            self._finish_kernels()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            self._note_memory(stack)
            stack.pop()
            if stack:
                stack[-1].seconds += wall
                stack[-1].cpu_seconds += cpu
            with self._lock:
                found = self.phases.setdefault(name, Phase())
                found.seconds += wall - inner.seconds
                found.cpu_seconds += cpu - inner.cpu_seconds
                found.flops += counted.flops
                found.bytes += counted.bytes
                found.count += 1
                found.peak = max(found.peak, inner.peak)

    def _finish_kernels(self) -> None:
        """A GPU is only told what to do: without waiting, its time would be that of whoever reads a result first."""
        if self._watches and threading.current_thread() is threading.main_thread() and torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def _note_memory(self, stack: list[Phase]) -> None:
        """What was reached since the last look belongs to the innermost open phase."""
        if not self._watches or threading.current_thread() is not threading.main_thread():
            return
        reached = high_water()
        self.peak = max(self.peak, reached)
        if stack:
            stack[-1].peak = max(stack[-1].peak, reached)
        reset_peak_memory()

    def to_json(self) -> dict[str, dict[str, float | None]]:
        """By phase name."""
        return {name: phase.to_json() for name, phase in self.phases.items()}
