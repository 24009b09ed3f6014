"""Vision transformers of timm: ViT, DeiT, DINOv2, Hiera and whatever else is made of blocks with `attn` and `mlp`;
those of torchvision, whose blocks are described in packed.py.

Heads: attn.qkv -> attn.proj, the projection to queries, keys and values being one matrix of three sections. Channels:
mlp.fc1 -> mlp.fc2; in gated MLPs fc1 holds two sections, or fc1_g and fc1_x stand beside each other. LayerScale
lies behind the consumers. A pre-norm block reads its stream through norm1 and norm2; where the norms stand elsewhere, a
block scales with parameters of its own or windows its tokens, no stream is named.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..errors import GrailError
from .network import INPUT, STILL, ModuleSite, Network, channels, heads
from .packed import blocks_of, tower


def describe(module: nn.Module, still: frozenset[str] = STILL) -> Network | None:
    """The network's sites, or None where it has no such blocks. Raises GrailError naming a block that computes
    otherwise."""
    blocks = [name for name, child in module.named_modules() if name and _is_block(child)]
    sites: list[ModuleSite] = []
    for number, name in enumerate(blocks):
        block = module.get_submodule(name)
        for kind, part in (("heads", block.attn), ("channels", block.mlp)):
            if kind not in still or not (_norms(part) or (kind == "heads" and not _splits(part))):
                if kind == "heads" and kind not in still:
                    _refuse_old(name, part)
                found = _attention(name, part, number) if kind == "heads" else _mlp(name, part, number)
                sites.append(replace(found, **_added(name, block, kind)))
    if not sites and (packed := blocks_of(module)):
        return tower(module, packed, still)
    return Network(module, sites, blocks) if sites else None


def _is_block(module: nn.Module) -> bool:
    attention, mlp = getattr(module, "attn", None), getattr(module, "mlp", None)
    return all(isinstance(getattr(attention, name, None), nn.Linear) for name in ("qkv", "proj")) and all(
        isinstance(getattr(mlp, name, None), nn.Linear) for name in (*_producers(mlp), "fc2")
    )


def _producers(mlp: nn.Module | None) -> list[str]:
    return [child for child in ("fc1_g", "fc1_x") if hasattr(mlp, child)] or ["fc1"]


def _norms(part: nn.Module) -> list[str]:
    """What mixes or gates all units of a site, by name."""
    return [c for c in ("norm", "gate") if not isinstance(getattr(part, c, None), (nn.Identity, type(None)))]


PARTS = {"heads": ("attn", "norm1", "ls1"), "channels": ("mlp", "norm2", "ls2")}
"""What makes a site's output, the norm in front of it, and the scale behind."""


def _added(name: str, block: nn.Module, kind: str) -> dict:
    """Where the outputs of a block's sites are added (ModuleSite); {} where that is not known."""
    children = list(dict(block.named_children()))
    part, norm, scale = PARTS[kind]
    otherwise = hasattr(block, "window_size") or any(True for _ in block.parameters(recurse=False))
    if otherwise or norm not in children or children.index(norm) > children.index(part):
        return {}
    scaled = isinstance(getattr(block, scale, None), nn.Module)
    scales = (f"{name}.{scale}",) if scaled and _has_parameters(block, scale) else ()
    return {"stream": (f"{name}.{norm}", INPUT), "scales": scales}


def _has_parameters(block: nn.Module, child: str) -> bool:
    return any(True for _ in getattr(block, child).parameters())


ATTRIBUTES = (("num_heads", "attn_dim"), ("heads", "dim_out"))
"""What an attention calls the number of its heads and the width of all, which its forward reshapes by; the second pair
is Hiera's."""
PLAIN = ("timm.models.vision_transformer", "timm.layers.attention")
"""Where the attention of timm's ViT lies, in older and in newer versions."""


def _refuse_old(name: str, attention: nn.Module) -> None:
    """Raises GrailError for timm's attention of before 1.0.23, whose forward reshapes by the width outside."""
    kind = type(attention)
    if kind.__module__ in PLAIN and kind.__name__ == "Attention" and not hasattr(attention, "attn_dim"):
        raise GrailError(f"{name}.attn: to remove heads needs timm 1.0.23 or newer; update it, or use --attn-ratio 0")


def _counted(attention: nn.Module) -> tuple[str, str] | None:
    """Those of ATTRIBUTES that an attention has; None where it says its number of heads nowhere."""
    return next((names for names in ATTRIBUTES if isinstance(getattr(attention, names[0], None), int)), None)


def _splits(attention: nn.Module) -> bool:
    """Whether its projection makes queries, keys and values of each of its heads."""
    names = _counted(attention)
    return names is not None and attention.qkv.out_features % (3 * getattr(attention, names[0])) == 0


def _attention(name: str, attention: nn.Module, number: int) -> ModuleSite:
    for child in _norms(attention):
        raise GrailError(f"{name}.attn has a {child} over all heads, which cannot be narrowed; use --attn-ratio 0")
    attributes = _counted(attention)
    if attributes is None:
        raise GrailError(f"{name}.attn says its number of heads nowhere (num_heads); use --attn-ratio 0")
    count, whole = attributes
    total, made = getattr(attention, count), attention.qkv.out_features
    if not _splits(attention):
        raise GrailError(
            f"{name}.attn.qkv makes {made} channels, which are not queries, keys and values of {total} heads; use "
            f"--attn-ratio 0"
        )
    size = made // 3 // total
    widths = [(f"{name}.attn", whole)] if hasattr(attention, whole) else []
    return heads(
        f"{name}.attn.qkv",
        f"{name}.attn.proj",
        count=total,
        size=size,
        sections=3,
        counts=[(f"{name}.attn", count)],
        widths=widths,
        name=f"{name}.attn",
        layer=number,
    )


def _mlp(name: str, mlp: nn.Module, number: int) -> ModuleSite:
    for child in _norms(mlp):
        raise GrailError(f"{name}.mlp has a {child} over the hidden channels: narrowing needs --mlp-ratio 0")
    width = mlp.fc2.in_features
    makes = _producers(mlp)
    sections = mlp.fc1.out_features // width if makes == ["fc1"] else 1
    producers = [f"{name}.mlp.{child}" for child in makes]
    return channels(producers, f"{name}.mlp.fc2", width=width, sections=sections, name=f"{name}.mlp", layer=number)
