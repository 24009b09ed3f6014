"""Memory that one chunk frees is there for the next one, or given back where there is much of it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FREED = 40 * 4096 * 1536 * 4
CHUNKS = """
import resource, sys, torch
from grail.machine import TRIMMED, trim_memory

def chunk():
    gate, up = torch.ones(4096, 1536), torch.ones(4096, 1536)
    both = gate * up
    return (both + gate)[0, 0].item()

for _ in range(3):
    chunk()
    trim_memory(int(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    chunk()
    trim_memory(int(sys.argv[1]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize())
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what is tuned is glibc's")


def cleared(numbers: int, **variables: str) -> int:
    """Bytes that the system had to clear for ten chunks, whose activations are FREED."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    script = [sys.executable, "-c", CHUNKS, str(numbers)]
    done = subprocess.run(script, capture_output=True, text=True, check=True, env=environment | variables)
    return int(done.stdout)


def test_the_activations_of_small_layers_stay():
    assert cleared(10**6) < 0.5 * FREED  # none, but a system that reclaims idle pages may take some in between


@pytest.mark.parametrize(
    ("numbers", "variables"),
    [(10**9, {}), (10**6, {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"})],
    ids=["a large layer", "as the environment says"],
)
def test_else_they_are_given_back(numbers, variables):
    assert cleared(numbers, **variables) > 0.9 * FREED
