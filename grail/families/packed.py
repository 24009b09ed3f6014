"""Blocks around nn.MultiheadAttention, whose projection to queries, keys and values is one packed parameter.

Heads: in_proj -> out_proj of `attention.Attention`, which takes the place of torch's own, where out_proj is never
called. Channels: the two linear layers of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from ..errors import GrailError
from .attention import Attention, replace_attention
from .network import INPUT, ModuleSite, Network, channels, heads


@dataclass(frozen=True)
class Parts:
    """Names within a block: the attention, the first and the last layer of the MLP; the scales behind both."""

    attention: str
    first: str
    last: str
    scales: tuple[str, str] | None = None

    def added(self, block: nn.Module, name: str, number: int) -> dict:
        """Where the output of the attention (0) or of the MLP (1) is added (ModuleSite): these blocks are pre-norm."""
        norm = f"ln_{number + 1}"
        if _child(block, norm) is None or any(True for _ in block.parameters(recurse=False)):
            return {}
        scale = _child(block, self.scales[number]) if self.scales else None
        scaled = scale is not None and any(True for _ in scale.parameters())
        return {
            "stream": (f"{name}.{norm}", INPUT),
            "scales": (f"{name}.{self.scales[number]}",) if scaled else (),
        }


PARTS = (
    Parts("attn", "mlp.c_fc", "mlp.c_proj", ("ls_1", "ls_2")),
    Parts("self_attention", "mlp.0", "mlp.3"),
)
"""open_clip's blocks, and those of torchvision's vision transformers."""


def blocks_of(module: nn.Module) -> dict[str, Parts]:
    """All such blocks by name, in the order of registration."""
    found = {name: _parts(child) for name, child in module.named_modules() if name}
    return {name: parts for name, parts in found.items() if parts is not None}


def tower(module: nn.Module, blocks: dict[str, Parts], still: frozenset[str]) -> Network:
    """The network of these blocks; attention whose heads may go is replaced in the module. Raises GrailError naming
    attention that computes otherwise."""
    sites: list[ModuleSite] = []
    for number, (name, parts) in enumerate(blocks.items()):
        block = module.get_submodule(name)
        if "heads" not in still:
            site, attention = _attention(module, f"{name}.{parts.attention}", number)
            # without batch_first out_proj's tokens stand in another order than the stream's
            sites.append(replace(site, **parts.added(block, name, 0)) if attention.batch_first else site)
        first, last = f"{name}.{parts.first}", f"{name}.{parts.last}"
        width = module.get_submodule(first).out_features
        added = parts.added(block, name, 1)
        sites.append(channels(first, last, width=width, name=f"{name}.mlp", layer=number, **added))
    return Network(module, sites, list(blocks))


def _parts(block: nn.Module) -> Parts | None:
    for parts in PARTS:
        layers = [_child(block, name) for name in (parts.attention, parts.first, parts.last)]
        if layers[0] is not None and all(isinstance(layer, nn.Linear) for layer in layers[1:]):
            return parts
    return None


def _child(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _attention(module: nn.Module, name: str, number: int) -> tuple[ModuleSite, Attention]:
    replace_attention(module, [name])
    found = module.get_submodule(name)
    if not isinstance(found, Attention):
        raise GrailError(f"{name} is a {type(found).__name__}, whose heads cannot be removed; use --attn-ratio 0")
    size = found.head_dim
    site = heads(
        f"{name}.in_proj", f"{name}.out_proj", count=found.num_heads, size=size, sections=3,
        counts=[(name, "num_heads")], name=name, layer=number,
    )  # fmt: skip
    return site, found
