"""Memory that a network takes, measured in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from ..errors import GrailError
from ..machine import high_water, resident_memory

AS_STORED = "stored"


def footprint(folder: Path, dtype: torch.dtype | None, device: torch.device) -> dict[str, int]:
    """ "memory peak": bytes, the most while it is loaded, reads a prompt and writes an answer, without what Python and
    its libraries take; on a GPU its allocations. Raises GrailError where the process fails."""
    name = str(dtype).removeprefix("torch.") if dtype else AS_STORED
    command = [sys.executable, "-m", __name__, str(folder), name, str(device)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.splitlines() or ["no reason given"])[-1]
        raise GrailError(f"{folder} could not be run in a process of its own: {reason}")
    return json.loads(done.stdout)


def _measure(folder: str, dtype: str, device: str) -> dict[str, int]:
    from transformers import AutoModelForCausalLM  # noqa: F401 - counted as a library, not as the network

    from .speed import decode, prefill
    from .whole import load_whole

    torch.set_grad_enabled(False)
    on_gpu = torch.device(device).type == "cuda"
    start = resident_memory()
    model = load_whole(Path(folder), None if dtype == AS_STORED else getattr(torch, dtype), device)
    prefill(model)
    decode(model)
    return {"memory peak": torch.cuda.max_memory_allocated(device) if on_gpu else high_water() - start}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measure(*sys.argv[1:])))
