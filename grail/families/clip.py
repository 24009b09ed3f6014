"""CLIP of open_clip, image and text towers: blocks with ln_1, attn (nn.MultiheadAttention), ln_2, mlp.c_fc, mlp.c_proj.

Heads: attn.in_proj -> attn.out_proj, once `families.attention.Attention` stands in the place of torch's own, whose
out_proj is never called. Channels: mlp.c_fc -> mlp.c_proj. An image tower of another kind (timm's, a ResNet) is
described by its own family. Text: what fills a caption up counts for nothing where the tower pools at the end of the
text; where it reads all places, all count.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..errors import GrailError
from . import resnet, vit
from .attention import Attention, replace_attention
from .base import Producer
from .network import IMAGES, STILL, TEXT, ModuleSite, Network, channels, heads

IMAGE_CALL, TEXT_CALL = "encode_image", "encode_text"
PADDING = 0
READS_ALL = ("last",)
"""Pooling of towers without a causal mask, whose tokens see what fills a text up."""


def describe(module: nn.Module, still: frozenset[str] = STILL) -> list[Network] | None:
    """The towers' networks, or None where there is no CLIP. Attention whose heads may go is replaced in the module.
    Raises GrailError naming a block that computes otherwise."""
    if not all(callable(getattr(module, call, None)) for call in (IMAGE_CALL, TEXT_CALL)):
        return None
    if not isinstance(getattr(module, "visual", None), nn.Module):
        return None
    image = _tower(module, [name for name in _blocks(module) if name.startswith("visual.")], still)
    if not image.sites:
        image = _of_another_family(module, still)
    text = _tower(module, [name for name in _blocks(module) if not name.startswith("visual.")], still)
    towers = [replace(image, call=IMAGE_CALL, reads=IMAGES)]
    if text.sites:
        towers.append(replace(text, call=TEXT_CALL, reads=TEXT, padding=_padding(module)))
    return [tower for tower in towers if tower.sites]


def _padding(module: nn.Module) -> int | None:
    text = getattr(module, "text", module)
    pooling = getattr(text, "pool_type", None) or getattr(module, "text_pool_type", None)
    return None if pooling in READS_ALL else getattr(text, "pad_id", PADDING)


def _blocks(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if name and _is_block(child)]


def _is_block(module: nn.Module) -> bool:
    mlp = getattr(module, "mlp", None)
    linear = all(isinstance(getattr(mlp, name, None), nn.Linear) for name in ("c_fc", "c_proj"))
    return linear and isinstance(getattr(module, "attn", None), nn.Module)


def _tower(module: nn.Module, blocks: list[str], still: frozenset[str]) -> Network:
    sites: list[ModuleSite] = []
    for number, name in enumerate(blocks):
        if "heads" not in still:
            sites.append(_attention(module, f"{name}.attn", number))
        width = module.get_submodule(f"{name}.mlp.c_fc").out_features
        fc, proj = f"{name}.mlp.c_fc", f"{name}.mlp.c_proj"
        sites.append(channels(fc, proj, width=width, name=f"{name}.mlp", layer=number))
    return Network(module, sites, blocks)


def _attention(module: nn.Module, name: str, number: int) -> ModuleSite:
    replace_attention(module, [name])
    found = module.get_submodule(name)
    if not isinstance(found, Attention):
        raise GrailError(f"{name} is a {type(found).__name__}, whose heads cannot be removed; use --attn-ratio 0")
    size = found.head_dim
    return heads(
        f"{name}.in_proj", f"{name}.out_proj", count=found.num_heads, size=size, sections=3,
        counts=[(name, "num_heads")], name=name, layer=number,
    )  # fmt: skip


def _of_another_family(module: nn.Module, still: frozenset[str]) -> Network:
    """An image tower of timm or a ResNet: its own family's description under the longer names."""
    for family in (vit, resnet):
        found = family.describe(module.visual, still)
        if found is not None:
            sites, residual = ([_moved(site) for site in part] for part in (found.sites, found.residual))
            return Network(module, sites, [f"visual.{name}" for name in found.blocks], residual)
    return Network(module, [])


def _moved(site: ModuleSite) -> ModuleSite:
    def longer(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"visual.{name}" for name in names)

    pairs = {key: tuple((f"visual.{n}", a) for n, a in getattr(site, key)) for key in ("counts", "widths")}
    producers = tuple(Producer(f"visual.{p.name}", p.rows_per_unit, p.sections) for p in site.producers)
    names = {"name": f"visual.{site.name}", "consumer": f"visual.{site.consumer}"}
    return replace(site, producers=producers, norms=longer(site.norms), readers=longer(site.readers), **names, **pairs)
