"""Top-1 and top-5 accuracy of an image classifier, and how often two of them agree.

B images of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import GrailError
from ..families.buffers import kept_buffers

TOP = 5
CLASSES_FOR_TOP = 10
"""With fewer classes, top-5 says little."""


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every sub-module is in the mode in which it was found, with the
    buffers that it had."""
    modes = [(inner, inner.training) for module in modules for inner in module.modules()]
    try:
        for module in modules:
            module.eval()
        with torch.no_grad(), kept_buffers(*modules):
            yield
    finally:
        for inner, training in modes:
            inner.training = training


def accuracy(
    module: nn.Module, batches: Iterable[Tensor], labels: Tensor, device: torch.device | str = "cpu"
) -> dict[str, float | int]:
    """{"top1", "top5" (10 classes or more), "count"}, shares of 1; batches are [B, C, H, W], labels int64 [N] in the
    same order, and the module, which is on `device` already, gives [B, classes].

    Raises GrailError when labels and images or outputs do not fit each other, or an output is not finite.
    """
    seen, right = 0, {1: 0, TOP: 0}
    with evaluating(module):
        for batch in batches:
            logits_BC = class_scores(module, batch.to(device, dtype_of(module)))
            classes = logits_BC.shape[1]
            _fits(labels, classes)
            wanted_B1 = labels[seen : seen + len(batch), None].to(logits_BC.device)
            seen += len(batch)
            if len(wanted_B1) < len(batch):
                break
            order = logits_BC.topk(min(TOP, classes)).indices
            for top in right:
                right[top] += int((order[:, :top] == wanted_B1).sum())
    if seen != len(labels) or not seen:
        more = "at least " if seen > len(labels) else ""
        raise GrailError(f"accuracy: {more}{seen} images for {len(labels)} labels; give one label for each image")
    found = {"top1": right[1] / seen}
    return found | ({"top5": right[TOP] / seen} if classes >= CLASSES_FOR_TOP else {}) | {"count": seen}


def agreement(
    module: nn.Module, other: nn.Module, batches: Iterable[Tensor], device: torch.device | str = "cpu"
) -> float:
    """Share of the images [B, C, H, W] for which both predict the same class: a figure that needs no labels.

    Raises GrailError when they have different numbers of classes, an output is not finite, or there are no images.
    """
    seen = same = 0
    with evaluating(module, other):
        for batch in batches:
            first_BC, second_BC = (class_scores(one, batch.to(device, dtype_of(one))) for one in (module, other))
            if first_BC.shape != second_BC.shape:
                widths = f"{first_BC.shape[1]} and {second_BC.shape[1]}"
                raise GrailError(f"agreement: the models have {widths} classes; compare models of the same classes")
            same += int((first_BC.argmax(1) == second_BC.argmax(1)).sum())
            seen += len(batch)
    if not seen:
        raise GrailError("agreement: there are no images; give at least one")
    return same / seen


def dtype_of(module: nn.Module) -> torch.dtype:
    """That of its floating-point parameters, float32 without any: what its inputs have to be."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def class_scores(module: nn.Module, batch: Tensor) -> Tensor:
    """Logits [B, C] of a plain module, or of one of transformers; raises GrailError for anything else."""
    found = module(batch)
    logits = getattr(found, "logits", found)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(batch):
        what = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise GrailError(f"accuracy: the model gives {what} where [images, classes] is expected; give a classifier")
    if not bool(logits.isfinite().all()):
        raise GrailError("accuracy: the model's outputs are not finite; try --dtype float32")
    return logits


def _fits(labels: Tensor, classes: int) -> None:
    if len(labels) and int(labels.max()) >= classes:
        raise GrailError(
            f"accuracy: labels run to {int(labels.max())}, but the model has {classes} outputs; "
            f"number the classes as the model does"
        )
