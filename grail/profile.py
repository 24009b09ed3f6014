"""Where time and memory go, phase by phase."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Phase:
    """Seconds of wall time and of CPU time of all threads, floating-point operations, bytes moved, and how often."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    count: int = 0

    @property
    def gflops(self) -> float | None:
        """Achieved rate, 10⁹ operations a second; None where nothing was counted."""
        return self.flops / self.seconds / 1e9 if self.flops and self.seconds else None

    @property
    def gbps(self) -> float | None:
        """Achieved rate, 10⁹ bytes a second; None where nothing was counted."""
        return self.bytes / self.seconds / 1e9 if self.bytes and self.seconds else None


class Profile:
    """Times by phase name. A phase within a phase is taken out of the outer one, so that the seconds of one thread add
    up; phases of background threads overlap with those of the main one."""

    def __init__(self):
        self.phases: dict[str, Phase] = {}
        self._open = threading.local()
        self._lock = threading.Lock()

    @contextmanager
    def phase(self, name: str, *, flops: float = 0.0, bytes: float = 0.0) -> Iterator[Phase]:
        """Add what happens within to the phase of that name; what is counted within may be added to what is yielded."""
        counted = Phase(flops=flops, bytes=bytes)
        stack = self._open.__dict__.setdefault("stack", [])
        stack.append([0.0, 0.0])
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield counted
        finally:
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            inner_wall, inner_cpu = stack.pop()
            if stack:
                stack[-1][0] += wall
                stack[-1][1] += cpu
            with self._lock:
                found = self.phases.setdefault(name, Phase())
                found.seconds += wall - inner_wall
                found.cpu_seconds += cpu - inner_cpu
                found.flops += counted.flops
                found.bytes += counted.bytes
                found.count += 1

    def to_json(self) -> dict[str, dict[str, float]]:
        """By phase: seconds, CPU seconds, achieved GFLOP/s and GB/s where they were counted, and how often."""
        return {
            name: {
                "seconds": round(phase.seconds, 3),
                "cpu_seconds": round(phase.cpu_seconds, 3),
                "gflops": phase.gflops and round(phase.gflops, 2),
                "gbps": phase.gbps and round(phase.gbps, 3),
                "count": phase.count,
            }
            for name, phase in self.phases.items()
        }
