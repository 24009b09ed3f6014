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
"""Shares of a network's weights (tensors, whatever their sizes: a head for many classes may hold most numbers) that
known blocks have: with less than the first it is refused, with less than the second there is a warning. ResNets and
transformers have 0.5 to 0.98, networks of which only the stem looks like one 0.05 and less."""


def describe(module: nn.Module, still: frozenset[str] = STILL) -> Network | None:
    """The sites that all families find, or None where none finds a block. Raises GrailError naming a block that
    computes otherwise."""
    found = [network for family in FAMILIES if (network := family.describe(module, still)) is not None]
    if not found:
        return None
    blocks = [name for network in found for name in network.blocks]
    sites, started = [], 0
    for network in found:
        sites += [replace(site, layer=site.layer + started) for site in network.sites]
        started += len(network.blocks)
    return Network(module, sites, blocks, [stream for network in found for stream in network.residual])


def share(network: Network) -> float:
    """Which part of a network's weights, matrices and convolutions, lies in its blocks."""
    weights = [name for name, parameter in network.module.named_parameters() if parameter.dim() > 1]
    inside = tuple(f"{name}." for name in network.blocks)
    return sum(name.startswith(inside) for name in weights) / max(len(weights), 1)


def check_share(network: Network) -> None:
    """Raises GrailError where the blocks are but a small part of the network."""
    known, blocks = share(network), network.blocks
    few = ", ".join([*blocks[:3], *(["..."] if len(blocks) > 3 else [])])
    found = f"{type(network.module).__name__}: the blocks that a family knows ({few}) hold {known:.1%} of its weights"
    if known < LEAST:
        raise GrailError(
            f"{found}, and all others would stay as they are: describe its sites by hand, "
            f"grail.compress(module, sites=[grail.channels(...), ...])"
        )
    if known < MOST:
        log.warning("%s; all others stay as they are", found)
