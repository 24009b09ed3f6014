"""Residual networks: BasicBlock and Bottleneck of timm, torchvision and CIFAR-style classes, preact too.

A block is any module with children conv1, conv2 (and conv3); sites are conv1 -> conv2 and conv2 -> conv3, with the
BatchNorm that is registered between the two. In a post-activation block that is the producer's own, in a
pre-activation one the consumer's: in both cases it reads the producer's output (`modules.verify` proves it).

What a block's last convolution makes is added, behind a BatchNorm where one follows, to the shortcut's output or to the
block's input; no addition is named where anything else with a state of its own (squeeze and excitation) stands between.

Residual streams, narrowed only on demand: all blocks up to the next one with a convolution in its shortcut add to one
stream. What stands before the first block begins the first stream, the classifier reads the last.
"""

from __future__ import annotations

import itertools

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..errors import GrailError
from .network import BY_HAND, INPUT, OUTPUT, RESIDUAL, STILL, ModuleSite, Network, channels, residual

CONVOLUTIONS = ("conv1", "conv2", "conv3")
SHORTCUTS = ("downsample", "shortcut")


def describe(module: nn.Module, still: frozenset[str] = STILL) -> Network | None:
    """The network's sites, or None where it has no such blocks. Raises GrailError naming a block whose convolutions are
    in groups or with something else than a BatchNorm between them."""
    blocks = [name for name, child in module.named_modules() if name and _is_block(child)]
    sites: list[ModuleSite] = []
    for number, name in enumerate(blocks):
        sites += _sites(name, module.get_submodule(name), number)
    streams = [] if RESIDUAL in still or not sites else _streams(module, blocks)
    return Network(module, sites, blocks, streams) if sites else None


def _is_block(module: nn.Module) -> bool:
    found = [getattr(module, name, None) for name in CONVOLUTIONS[:2]]
    # two depthwise ones behind each other (XCiT's patches) are no hidden vector
    return all(isinstance(conv, _ConvNd) for conv in found) and (found[0].groups == 1 or found[0].in_channels == 1)


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
            raise GrailError(
                f"{name}: {what} between {producer} and {consumer}; one BatchNorm at most can be narrowed; {BY_HAND}"
            )
        found.append(
            channels(
                f"{name}.{producer}",
                f"{name}.{consumer}",
                width=children[producer].out_channels,
                norms=[f"{name}.{norm}" for norm in norms],
                layer=number,
                **(_added(name, block) if consumer == present[-1] else {}),
            )
        )
    return found


def _added(name: str, block: nn.Module) -> dict:
    """Where the output of a block's last convolution is added (ModuleSite); {} where that is not known."""
    children = {child: part for child, part in block.named_children() if child not in SHORTCUTS}
    last = max(list(children).index(conv) for conv in CONVOLUTIONS if conv in children)
    behind = [child for child in list(children)[last + 1 :] if _has_state(children[child])]
    if len(behind) > 1 or not all(isinstance(children[child], _BatchNorm) for child in behind):
        return {}
    shortcut = next((child for child in SHORTCUTS if isinstance(getattr(block, child, None), nn.Module)), None)
    stream = (name, INPUT) if shortcut is None else (f"{name}.{shortcut}", OUTPUT)
    return {"stream": stream, "scales": tuple(f"{name}.{child}" for child in behind)}


def _streams(module: nn.Module, blocks: list[str]) -> list[ModuleSite]:
    """The residual streams; the last one is missing where no classifier reads it."""
    names = [name for name, _ in module.named_modules()]
    writers, readers, norms = [_writer(module, names[: names.index(blocks[0])])], [], []
    found: list[ModuleSite] = []
    for name in blocks:
        main, shortcut = _paths(module, name)
        readers.append(f"{name}.conv1")
        norms += _norm_in_front(module, name)
        if shortcut:
            readers.append(next(inner for inner in shortcut if isinstance(module.get_submodule(inner), _ConvNd)))
            found.append(_stream(module, len(found), writers, readers, norms))
            writers, readers, norms = [_writer(module, shortcut)], [], []
        writers.append(_writer(module, main))
    width = module.get_submodule(writers[-1][0]).out_channels
    inside = tuple(f"{block}." for block in blocks)
    behind = [name for name in names[names.index(blocks[-1]) + 1 :] if not name.startswith(inside)]
    classifiers = [name for name in behind if _reads(module.get_submodule(name), width) and "attn" not in name]
    if classifiers:  # an attention pool reads its input in several places
        norms += [name for name in behind if isinstance(module.get_submodule(name), _BatchNorm)]
        found.append(_stream(module, len(found), writers, [*readers, classifiers[-1]], norms))
    return found


def _reads(layer: nn.Module, width: int) -> bool:
    if isinstance(layer, nn.Linear):
        return layer.in_features == width
    return isinstance(layer, _ConvNd) and layer.in_channels == width


def _norm_in_front(module: nn.Module, name: str) -> list[str]:
    """The BatchNorm through which a pre-activation block reads its stream; none in other blocks."""
    children = list(dict(module.get_submodule(name).named_children()))
    in_front = [f"{name}.{child}" for child in children[: children.index("conv1")] if child not in SHORTCUTS]
    return [inner for inner in in_front if isinstance(module.get_submodule(inner), _BatchNorm)]


def _paths(module: nn.Module, name: str) -> tuple[list[str], list[str]]:
    """Modules of a block up to the BatchNorm behind its last convolution, and those of a shortcut with parameters."""
    block = module.get_submodule(name)
    children = [child for child, _ in block.named_children()]
    last = max(children.index(conv) for conv in CONVOLUTIONS if conv in children)
    inner = [
        f"{name}.{child}.{part}".removesuffix(".")
        for child in SHORTCUTS
        if isinstance(getattr(block, child, None), nn.Module)
        for part, _ in getattr(block, child).named_modules()
    ]
    shortcut = inner if any(isinstance(module.get_submodule(part), _ConvNd) for part in inner) else []
    return [f"{name}.{child}" for child in children[: last + 2] if child not in SHORTCUTS], shortcut


def _writer(module: nn.Module, names: list[str]) -> tuple[str, str | None]:
    """The last convolution among modules, and the BatchNorm behind it."""
    layers = {name: module.get_submodule(name) for name in names if name}
    convolutions = [name for name, layer in layers.items() if isinstance(layer, _ConvNd)]
    if not convolutions:
        raise GrailError("--residual-ratio: what begins or ends a residual stream of this network is not known")
    behind = itertools.dropwhile(lambda name: name != convolutions[-1], layers)
    return convolutions[-1], next((name for name in behind if isinstance(layers[name], _BatchNorm)), None)


def _stream(
    module: nn.Module, number: int, writers: list[tuple[str, str | None]], readers: list[str], reader_norms: list[str]
) -> ModuleSite:
    norms = [norm for _, norm in writers if norm is not None]
    if norms and len(norms) != len(writers):
        bare = next(conv for conv, norm in writers if norm is None)
        raise GrailError(f"--residual-ratio: {bare} has no BatchNorm where others that write to its stream have one")
    width = module.get_submodule(writers[0][0]).out_channels
    names = [conv for conv, _ in writers]
    return residual(names, readers, width=width, norms=norms, reader_norms=reader_norms, name=f"residual{number}")


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())
