"""Vision transformers of timm: ViT, DeiT, DINOv2 and whatever else is made of blocks with `attn` and `mlp`.

Heads: attn.qkv -> attn.proj, the projection to queries, keys and values being one matrix of three sections. Channels:
mlp.fc1 -> mlp.fc2; in gated MLPs fc1 holds two sections, or fc1_g and fc1_x stand beside each other. LayerScale
and drop path lie behind the consumers and do not matter.
"""

from __future__ import annotations

from torch import nn

from ..errors import GrailError
from .network import ModuleSite, Network, channels, heads


def describe(module: nn.Module) -> Network | None:
    """The network's sites, or None where it has no such blocks. Raises GrailError naming a block that computes
    otherwise."""
    blocks = [name for name, child in module.named_modules() if name and _is_block(child)]
    sites: list[ModuleSite] = []
    for number, name in enumerate(blocks):
        block = module.get_submodule(name)
        sites += [*_attention(name, block.attn, number), _mlp(name, block.mlp, number)]
    return Network(module, sites, blocks) if sites else None


def _is_block(module: nn.Module) -> bool:
    attention, mlp = getattr(module, "attn", None), getattr(module, "mlp", None)
    return all(isinstance(getattr(attention, name, None), nn.Linear) for name in ("qkv", "proj")) and all(
        isinstance(getattr(mlp, name, None), nn.Linear) for name in ("fc2",)
    )


def _attention(name: str, attention: nn.Module, number: int) -> list[ModuleSite]:
    for child in ("norm", "gate"):
        if not isinstance(getattr(attention, child, None), (nn.Identity, type(None))):
            raise GrailError(f"{name}.attn has a {child} over all heads, which cannot be narrowed; use --attn-ratio 0")
    size = attention.qkv.out_features // 3 // attention.num_heads
    widths = [(f"{name}.attn", "attn_dim")] if hasattr(attention, "attn_dim") else []
    return [
        heads(
            f"{name}.attn.qkv",
            f"{name}.attn.proj",
            count=attention.num_heads,
            size=size,
            sections=3,
            counts=[(f"{name}.attn", "num_heads")],
            widths=widths,
            name=f"{name}.attn",
            layer=number,
        )
    ]


def _mlp(name: str, mlp: nn.Module, number: int) -> ModuleSite:
    if not isinstance(getattr(mlp, "norm", None), (nn.Identity, type(None))):
        raise GrailError(f"{name}.mlp has a norm over the hidden channels, which cannot be narrowed")
    width = mlp.fc2.in_features
    gated = [child for child in ("fc1_g", "fc1_x") if hasattr(mlp, child)]
    sections = 1 if gated else mlp.fc1.out_features // width
    producers = [f"{name}.mlp.{child}" for child in gated or ["fc1"]]
    return channels(producers, f"{name}.mlp.fc2", width=width, sections=sections, name=f"{name}.mlp", layer=number)
