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
    weights_NL: Tensor | None = None,
    track: Callable[[Iterable[int]], Iterable[int]] = lambda layers: layers,
) -> float:
    """exp of the mean negative log-likelihood, over the windows of all processes. weights_NL: how much each token
    counts as a target, float32. `track` may wrap the loop over layers, to show progress.

    Raises GrailError when it is not finite.
    """
    work, targets = work or Workspace(), counted_targets(windows_NL, weights_NL)
    batches = work.split(windows_NL)
    mine = work.mine(len(batches))
    for number in mine:
        work.store.put(SERIES, number, model.embed(batches[number]))
    block = None
    for index in track(range(model.layer_count)):
        del block  # before the next layer is read
        block = model.block(index)
        trim_memory(block.numbers)
        for number in mine:
            work.store.put(SERIES, number, block.run(work.store.get(SERIES, number, model.device)))
    del block
    found = _losses(model, work, batches, None if weights_NL is None else work.split(weights_NL), mine)
    work.store.drop(SERIES, mine)
    # added up in the order of the windows, whoever computed them
    total = sum(loss for part in work.group.gather(found) for loss in part)
    mean = total / targets
    if not math.isfinite(mean):
        raise GrailError(f"{model.source.path}: the evaluation loss is not finite; try --dtype float32")
    return math.exp(min(mean, 700.0))


def counted_targets(windows_NL: Tensor, weights_NL: Tensor | None) -> float:
    """How many tokens are predicted, each as often as it counts. Raises GrailError where none is."""
    targets = windows_NL.numel() - len(windows_NL) if weights_NL is None else weights_NL[:, 1:].double().sum().item()
    if not targets:
        raise GrailError("no token of the windows that are judged counts as one to predict; give other windows")
    return targets


@torch.no_grad()
def _losses(
    model: Decoder, work: Workspace, batches: list[Tensor], weights: list[Tensor] | None, mine: list[int]
) -> list[float]:
    """Summed negative log-likelihood of each of this process's chunks, each token times its weight."""
    tail, losses = model.tail(), []
    for number in mine:
        x_BLD = work.store.get(SERIES, number, model.device)
        rows = x_BLD[:, :-1].reshape(-1, x_BLD.shape[-1]).split(LOGIT_ROWS)
        targets = _targets(batches[number]).to(x_BLD.device).split(LOGIT_ROWS)
        counts = None if weights is None else _targets(weights[number]).to(x_BLD.device).split(LOGIT_ROWS)
        losses.append(0.0)
        for part, (rows_TD, targets_T) in enumerate(zip(rows, targets, strict=True)):
            if counts is None:
                losses[-1] += cross_entropy(tail(rows_TD), targets_T, reduction="sum").item()
            else:
                losses[-1] += (cross_entropy(tail(rows_TD), targets_T, reduction="none") @ counts[part]).item()
    return losses


def _targets(windows_BL: Tensor) -> Tensor:
    """Of all tokens that are predicted, [B (L - 1)]."""
    return windows_BL[:, 1:].reshape(-1)


def logits(model: Decoder, ids_BL: Tensor) -> Tensor:
    """Logits [B, L, V] of a few tokens, layer by layer."""
    x_BLD = model.embed(ids_BL)
    for index in range(model.layer_count):
        block = model.block(index)
        x_BLD = block.run(x_BLD)
        trim_memory(block.numbers)
    with torch.no_grad():
        return model.tail()(x_BLD)
