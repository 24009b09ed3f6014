"""Tokens per second of plain transformers models, several side by side in one process, and a short sample."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..calibration.tokenizer import load_tokenizer

PREFILL_SHAPE = (2, 256)
DECODED = 32
ROUNDS = 3


def speed(models: dict[str, Any]) -> dict[str, dict]:
    """By label: prefill and decode rates, the median of three interleaved rounds after one that is not counted."""
    times: dict[str, dict[str, list[float]]] = {label: {"prefill": [], "decode": []} for label in models}
    for round_number in range(ROUNDS + 1):
        for label, model in models.items():
            measured = {"prefill": _seconds(prefill, model), "decode": _seconds(decode, model)}
            if round_number:
                for phase, seconds in measured.items():
                    times[label][phase].append(seconds)
    found = {}
    for label in models:
        prefilled, decoded = (statistics.median(times[label][phase]) for phase in ("prefill", "decode"))
        tokens = PREFILL_SHAPE[0] * PREFILL_SHAPE[1]
        found[label] = {"prefill tokens/s": tokens / prefilled, "decode tokens/s": DECODED / decoded}
    return found


def _seconds(run: Callable[[Any], None], model: Any) -> float:
    start = time.perf_counter()
    run(model)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - start


@torch.no_grad()
def prefill(model: Any) -> None:
    """One forward over PREFILL_SHAPE tokens."""
    model(torch.zeros(PREFILL_SHAPE, dtype=torch.int64, device=model.device), use_cache=False)


@torch.no_grad()
def decode(model: Any) -> None:
    """DECODED tokens, one after the other."""
    ids = torch.zeros((1, 8), dtype=torch.int64, device=model.device)
    length = {"max_new_tokens": DECODED, "min_new_tokens": DECODED}
    model.generate(ids, attention_mask=torch.ones_like(ids), **length, do_sample=False, pad_token_id=0)


@torch.no_grad()
def sample(model: Any, folder: Path, prompt: str) -> str:
    """A short greedy continuation of the prompt."""
    tokenizer = load_tokenizer(folder)
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    out = model.generate(
        encoded.input_ids,
        attention_mask=encoded.attention_mask,
        max_new_tokens=DECODED,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(out[0], skip_special_tokens=True)
