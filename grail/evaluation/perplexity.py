"""Perplexity of a checkpoint folder, one layer in memory at a time.

Protocol (CONTRACTS): non-overlapping windows, no added BOS, mean negative log-likelihood over seq_len - 1 targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..errors import GrailError
from ..families.decoder import LOGIT_ROWS, Decoder

CHUNK_TOKENS = 4096


def chunked(windows_NL: Tensor, tokens: int = CHUNK_TOKENS) -> list[Tensor]:
    """Windows in batches of about `tokens` tokens, at least one window each."""
    return list(windows_NL.split(max(tokens // windows_NL.shape[1], 1)))


def perplexity(
    model: Decoder, windows_NL: Tensor, *, track: Callable[[Iterable[int]], Iterable[int]] = lambda layers: layers
) -> float:
    """exp of the mean negative log-likelihood. `track` may wrap the loop over layers, to show progress.

    Raises GrailError when it is not finite.
    """
    batches = chunked(windows_NL)
    states = [model.embed(ids) for ids in batches]
    for index in track(range(model.layer_count)):
        block = model.block(index)
        for i, x_BLD in enumerate(states):
            states[i] = block.run(x_BLD)
    tail = model.tail()
    total, count = 0.0, 0
    with torch.no_grad():
        for ids_BL, x_BLD in zip(batches, states, strict=True):
            targets = ids_BL[:, 1:].reshape(-1).to(x_BLD.device)
            rows = x_BLD[:, :-1].reshape(-1, x_BLD.shape[-1])
            for rows_TD, targets_T in zip(rows.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
                total += cross_entropy(tail(rows_TD), targets_T, reduction="sum").item()
            count += len(targets)
    mean = total / count
    if not math.isfinite(mean):
        raise GrailError(f"{model.source.path}: the evaluation loss is not finite; try --dtype float32")
    return math.exp(min(mean, 700.0))


def logits(model: Decoder, ids_BL: Tensor) -> Tensor:
    """Logits [B, L, V] of a few tokens, layer by layer."""
    x_BLD = model.embed(ids_BL)
    for index in range(model.layer_count):
        x_BLD = model.block(index).run(x_BLD)
    with torch.no_grad():
        return model.tail()(x_BLD)
