"""Tokens per second of plain transformers models, several side by side in one process, and a short sample."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from ..calibration.tokenizer import load_tokenizer

PREFILL_SHAPE = (2, 256)
DECODED = 32
ROUNDS = 3


def load_plain(folders: dict[str, Path], dtype: torch.dtype) -> dict[str, Any]:
    """Whole transformers models, side by side in memory."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": dtype, "trust_remote_code": False}
    return {label: AutoModelForCausalLM.from_pretrained(path, **options).eval() for label, path in folders.items()}


def speed(models: dict[str, Any]) -> dict[str, dict]:
    """By label: prefill and decode rates, the median of three interleaved rounds."""
    times: dict[str, dict[str, list[float]]] = {label: {"prefill": [], "decode": []} for label in models}
    for round_number in range(ROUNDS + 1):
        for label, model in models.items():
            measured = {"prefill": _prefill(model), "decode": _decode(model)}
            if round_number:
                for phase, seconds in measured.items():
                    times[label][phase].append(seconds)
    found = {}
    for label in models:
        prefill, decode = (statistics.median(times[label][phase]) for phase in ("prefill", "decode"))
        tokens = PREFILL_SHAPE[0] * PREFILL_SHAPE[1]
        found[label] = {"prefill tokens/s": tokens / prefill, "decode tokens/s": DECODED / decode}
    return found


@torch.no_grad()
def _prefill(model) -> float:
    ids = torch.zeros(PREFILL_SHAPE, dtype=torch.int64)
    start = time.perf_counter()
    model(ids, use_cache=False)
    return time.perf_counter() - start


@torch.no_grad()
def _decode(model) -> float:
    ids = torch.zeros((1, 8), dtype=torch.int64)
    start = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=DECODED,
        min_new_tokens=DECODED,
        do_sample=False,
        pad_token_id=0,
    )
    return time.perf_counter() - start


def sample(model, folder: Path, prompt: str) -> str:
    """A short greedy continuation of the prompt."""
    tokenizer = load_tokenizer(folder)
    encoded = tokenizer(prompt, return_tensors="pt")
    out = model.generate(
        encoded.input_ids,
        attention_mask=encoded.attention_mask,
        max_new_tokens=DECODED,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(out[0], skip_special_tokens=True)
