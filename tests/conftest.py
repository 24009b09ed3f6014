"""Two threads at most, no network, and a reopening check that does not start a process for every tiny model."""

from __future__ import annotations

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TQDM_DISABLE"] = "1"
os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported; test_aot.py compiles in a process of its own

import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file

settings.register_profile("ci", derandomize=True, print_blob=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

torch.set_num_threads(min(int(os.environ["OMP_NUM_THREADS"]), 2))


@pytest.fixture
def reopen_here(monkeypatch, tmp_path_factory):
    """The reopening check itself, in this process: the same comparisons without four seconds of imports."""
    from grail.checkpoint import reopen

    def verify(folder, probe_1L, logits_1LV, dtype, token_ids, written, *, layerwise, loads="plain"):
        work = tmp_path_factory.mktemp("reopen")
        save_file({"ids": probe_1L, "logits": logits_1LV.float().contiguous()}, work / "probe.safetensors")
        (work / "expected.json").write_text(json.dumps({"token_ids": token_ids, "tensors": written}))
        return reopen.check(folder, work, dtype, layerwise=layerwise, loads=loads)

    monkeypatch.setattr(reopen, "verify", verify)
