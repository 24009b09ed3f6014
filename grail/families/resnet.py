"""Residual networks: BasicBlock and Bottleneck of timm, torchvision and CIFAR-style classes, preact too.

A block is any module with children conv1, conv2 (and conv3); sites are conv1 -> conv2 and conv2 -> conv3, with the
BatchNorm that is registered between the two. In a post-activation block that is the producer's own, in a
pre-activation one the consumer's: in both cases it reads the producer's output (`families.network.verify` proves it).
"""

from __future__ import annotations

import itertools

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..errors import GrailError
from .network import ModuleSite, Network, channels

CONVOLUTIONS = ("conv1", "conv2", "conv3")


def describe(module: nn.Module, still: frozenset[str] = frozenset()) -> Network | None:
    """The network's sites, or None where it has no such blocks. Raises GrailError naming a block whose convolutions are
    in groups or with something else than a BatchNorm between them."""
    blocks = [name for name, child in module.named_modules() if name and _is_block(child)]
    sites: list[ModuleSite] = []
    for number, name in enumerate(blocks):
        sites += _sites(name, module.get_submodule(name), number)
    return Network(module, sites, blocks) if sites else None


def _is_block(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), _ConvNd) for name in CONVOLUTIONS[:2])


def _sites(name: str, block: nn.Module, number: int) -> list[ModuleSite]:
    children = dict(block.named_children())
    order = list(children)
    present = [conv for conv in CONVOLUTIONS if conv in children]
    found = []
    for producer, consumer in itertools.pairwise(present):
        between = order[order.index(producer) + 1 : order.index(consumer)]
        norms = [child for child in between if isinstance(children[child], _BatchNorm)]
        others = [c for c in between if c not in norms and _has_state(children[c])]
        if others or len(norms) > 1:
            what = ", ".join(type(children[c]).__name__ for c in (*norms, *others))
            raise GrailError(f"{name}: {what} between {producer} and {consumer}; one BatchNorm at most can be narrowed")
        found.append(
            channels(
                f"{name}.{producer}",
                f"{name}.{consumer}",
                width=children[producer].out_channels,
                norms=[f"{name}.{norm}" for norm in norms],
                layer=number,
            )
        )
    return found


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())
