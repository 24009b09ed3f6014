"""Memory that a network takes, measured in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import torch

from ..children import python
from ..errors import GrailError
from ..machine import high_water, reset_peak_memory, resident_memory

AS_STORED = "stored"


def footprint(folder: Path, dtype: torch.dtype | None, device: torch.device) -> dict[str, int]:
    """ "memory peak": bytes, the most while it is loaded, reads a prompt and writes an answer, without what Python and
    its libraries take; on a GPU its allocations. Raises GrailError where the process fails."""
    name = str(dtype).removeprefix("torch.") if dtype else AS_STORED
    done = subprocess.run(python(__name__, folder, name, device), capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.splitlines() or ["no reason given"])[-1]
        if done.returncode < 0:
            reason = f"signal {-done.returncode} ended it; is there enough memory?"
        raise GrailError(f"{folder} could not be run in a process of its own: {reason}")
    return json.loads(done.stdout)


def _measure(folder: str, dtype: str, device: str) -> dict[str, int]:
    from .speed import decode, prefill
    from .whole import load_whole

    torch.set_grad_enabled(False)
    on_gpu = torch.device(device).type == "cuda"
    if not on_gpu:
        _load_libraries(Path(folder))
        reset_peak_memory()
    start = resident_memory()
    model = load_whole(Path(folder), None if dtype == AS_STORED else getattr(torch, dtype), device)
    prefill(model)
    decode(model)
    return {"memory peak": torch.cuda.max_memory_allocated(device) if on_gpu else high_water() - start}


def _load_libraries(folder: Path) -> None:
    """What transformers loads only when it loads, runs and asks a network, hundreds of megabytes: on a small one."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    from .speed import decode, prefill
    from .whole import load_whole

    with suppress(Exception), torch.device("meta"):  # what is wrong with the folder is told when it is loaded
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with tempfile.TemporaryDirectory(prefix="grail-footprint-") as small:
        AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=8)).save_pretrained(small)
        model = load_whole(Path(small), torch.float32)
        prefill(model)
        decode(model)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measure(*sys.argv[1:])))
