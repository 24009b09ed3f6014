"""A network of the blocks of several families (a ResNet in front of a ViT, a stem of convolutions): all that is found,
as one network. Sites of one part may stand beside those of another; what a run finds them to be is proven as ever."""

from __future__ import annotations

import logging
from dataclasses import replace

from torch import nn

from ..errors import GrailError
from . import resnet, vit
from .network import STILL, Network

log = logging.getLogger("grail")

FAMILIES = (resnet, vit)
LEAST, MOST = 0.1, 0.5
"""Shares of a network's parameters that known blocks hold: with less than the first it is refused, with less than the
second there is a warning. ResNets and transformers have 0.65 to 0.99, networks of which only the stem looks like one
0.01 and less."""


def describe(module: nn.Module, still: frozenset[str] = STILL) -> Network | None:
    """The sites that all families find, or None where none finds a block. Raises GrailError naming a block that
    computes otherwise, and where the blocks are but a small part of the network."""
    found = [network for family in FAMILIES if (network := family.describe(module, still)) is not None]
    if not found:
        return None
    blocks = [name for network in found for name in network.blocks]
    _check_share(module, blocks)
    sites, started = [], 0
    for network in found:
        sites += [replace(site, layer=site.layer + started) for site in network.sites]
        started += len(network.blocks)
    return Network(module, sites, blocks, [stream for network in found for stream in network.residual])


def _check_share(module: nn.Module, blocks: list[str]) -> None:
    inside = tuple(f"{name}." for name in blocks)
    counts = {name: parameter.numel() for name, parameter in module.named_parameters()}
    share = sum(count for name, count in counts.items() if name.startswith(inside)) / sum(counts.values())
    few = ", ".join([*blocks[:3], *(["..."] if len(blocks) > 3 else [])])
    found = f"{type(module).__name__}: the blocks that a family knows ({few}) hold {share:.1%} of its parameters"
    if share < LEAST:
        raise GrailError(
            f"{found}, and all others would stay as they are: describe its sites by hand, "
            f"grail.compress(module, sites=[grail.channels(...), ...])"
        )
    if share < MOST:
        log.warning("%s; all others stay as they are", found)
