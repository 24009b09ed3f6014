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
from ..machine import trim_memory
from ..workspace import Workspace

SERIES = "evaluation"


def perplexity(
    model: Decoder,
    windows_NL: Tensor,
    work: Workspace | None = None,
    *,
    track: Callable[[Iterable[int]], Iterable[int]] = lambda layers: layers,
) -> float:
    """exp of the mean negative log-likelihood, over the windows of all processes. `track` may wrap the loop over
    layers, to show progress.

    Raises GrailError when it is not finite.
    """
    work = work or Workspace()
    batches = work.split(windows_NL)
    mine = work.mine(len(batches))
    for number in mine:
        work.store.put(SERIES, number, model.embed(batches[number]))
    block = None
    for index in track(range(model.layer_count)):
        del block  # before the next layer is read
        trim_memory()
        block = model.block(index)
        for number in mine:
            work.store.put(SERIES, number, block.run(work.store.get(SERIES, number, model.device)))
    del block
    found = _losses(model, work, batches, mine)
    work.store.drop(SERIES, mine)
    # added up in the order of the windows, whoever computed them
    mean = sum(loss for part in work.group.gather(found) for loss in part) / (windows_NL.numel() - len(windows_NL))
    if not math.isfinite(mean):
        raise GrailError(f"{model.source.path}: the evaluation loss is not finite; try --dtype float32")
    return math.exp(min(mean, 700.0))


@torch.no_grad()
def _losses(model: Decoder, work: Workspace, batches: list[Tensor], mine: list[int]) -> list[float]:
    """Summed negative log-likelihood of each of this process's chunks."""
    tail, losses = model.tail(), []
    for number in mine:
        x_BLD = work.store.get(SERIES, number, model.device)
        targets = batches[number][:, 1:].reshape(-1).to(x_BLD.device)
        rows = x_BLD[:, :-1].reshape(-1, x_BLD.shape[-1])
        losses.append(0.0)
        for rows_TD, targets_T in zip(rows.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
            losses[-1] += cross_entropy(tail(rows_TD), targets_T, reduction="sum").item()
    return losses


def logits(model: Decoder, ids_BL: Tensor) -> Tensor:
    """Logits [B, L, V] of a few tokens, layer by layer."""
    x_BLD = model.embed(ids_BL)
    for index in range(model.layer_count):
        x_BLD = model.block(index).run(x_BLD)
        trim_memory()
    with torch.no_grad():
        return model.tail()(x_BLD)
