"""REPAIR (Jordan et al., ICLR 2023): BatchNorm statistics estimated anew on the compressed network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import GrailError


def norms_of(module: nn.Module) -> list[_BatchNorm]:
    """The BatchNorms that keep statistics."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


@torch.no_grad()
def repair(module: nn.Module, batches: list[Tensor], call: str = "") -> int:
    """Reset every BatchNorm's running statistics and average those of the batches; how many there were. All other
    modules stay in evaluation mode, and afterwards so do these. Batches count alike, so a smaller last one is left out
    where there are others. call: the method that is run (default: forward)."""
    norms = norms_of(module)
    momenta = [norm.momentum for norm in norms]
    if not norms or not batches:
        return 0
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    full = [batch for batch in batches if len(batch) == len(batches[0])]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        for batch in full:
            (getattr(module, call) if call else module)(batch.clone())
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise GrailError("--repair: a BatchNorm sees one number per channel in a batch; give more images") from error
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for each, training in modes:
            each.training = training
    return len(norms)
