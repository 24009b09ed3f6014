"""transformers' own vision networks (5.15.1 to 5.24): ViT, DeiT, DINOv2 and CLIP, whose projections are layers of
their own.

Heads: q_proj, k_proj and v_proj -> out_proj (CLIP: `self_attn`) or o_proj (the others: `attention`). Their forwards
reshape by `head_dim`, which stays; the number of heads is an attribute that nothing reads, and is kept right. Channels:
mlp.fc1 -> mlp.fc2, or gate_proj and up_proj -> down_proj. DINOv2 before 5.18: query, key and value -> output.dense in
a forward that reshapes by the number of heads and by their whole width, and weights_in of two sections -> weights_out.
What scales a block's output (LayerScale) lies behind the consumers; all are pre-norm, so that a norm reads the stream.
CLIP's text tower is causal and pools at the end of a text: what stands behind that counts for nothing.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

from torch import nn

from .network import IMAGES, INPUT, TEXT, ModuleSite, Network, channels, heads
from .texts import up_to_the_end

IMAGE_CALL, TEXT_CALL = "get_image_features", "get_text_features"
IMAGE_TOWER, TEXT_TOWER = "vision_model", "text_model"


class Attention(NamedTuple):
    """Names within a block: the attention, the layer that reads its heads, the module that holds its projections,
    these, and the attribute that is a head's width."""

    name: str
    consumer: str
    inner: str
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    size: str = "head_dim"


ATTENTION = (
    Attention("self_attn", "self_attn.out_proj", "self_attn"),
    Attention("attention", "attention.o_proj", "attention"),
    Attention(
        "attention", "attention.output.dense", "attention.attention", ("query", "key", "value"), "attention_head_size"
    ),
)
COUNTS, WIDTHS = ("num_heads", "num_attention_heads"), ("all_head_size",)
NORMS = (("layernorm_before", "layernorm_after"), ("norm1", "norm2"), ("layer_norm1", "layer_norm2"))
SCALES = ("layer_scale1", "layer_scale2")
"""Of the attention and of the MLP."""
MLP = ((("fc1",), "fc2"), (("gate_proj", "up_proj"), "down_proj"), (("weights_in",), "weights_out"))
LEGACY_END = 2
"""An end-of-text id that stands for the largest id of a text (configurations before transformers' #24773)."""


def describe(module: nn.Module) -> list[Network] | None:
    """The network, or the towers' networks of one that reads images and texts; None where it has no such blocks."""
    blocks = [name for name, child in module.named_modules() if name and _attention(child) and _mlp(child)]
    if not blocks:
        return None
    if all(callable(getattr(module, call, None)) for call in (IMAGE_CALL, TEXT_CALL)):
        image, text = ([b for b in blocks if b.startswith(f"{tower}.")] for tower in (IMAGE_TOWER, TEXT_TOWER))
        towers = [replace(_network(module, image), call=IMAGE_CALL), _of_text(_network(module, text), TEXT_CALL)]
        return [tower for tower in towers if tower.sites]
    network = _network(module, blocks)
    return [_of_text(network, "") if getattr(module, "main_input_name", IMAGES) == "input_ids" else network]


def _of_text(network: Network, call: str) -> Network:
    text = getattr(network.module, TEXT_TOWER, network.module)
    end = getattr(text, "eos_token_id", None)
    counted = partial(up_to_the_end, end=None if end == LEGACY_END else end) if isinstance(end, int) else None
    return replace(network, call=call, reads=TEXT, counted=counted)


def _network(module: nn.Module, blocks: list[str]) -> Network:
    sites = [site for number, name in enumerate(blocks) for site in _sites(module.get_submodule(name), name, number)]
    return Network(module, sites, blocks)


def _sites(block: nn.Module, name: str, number: int) -> list[ModuleSite]:
    found = _attention(block)
    attention, here = block.get_submodule(found.inner), f"{name}.{found.inner}"
    size = getattr(attention, found.size)
    counts, widths = ([(here, each) for each in names if hasattr(attention, each)] for names in (COUNTS, WIDTHS))
    made = [f"{here}.{projection}" for projection in found.projections]
    count = block.get_submodule(found.consumer).in_features // size
    of_heads = heads(
        made, f"{name}.{found.consumer}", count=count, size=size, counts=counts, widths=widths,
        name=f"{name}.{found.name}", layer=number, **_added(block, name, 0),
    )  # fmt: skip
    producers, consumer = _mlp(block)
    width = getattr(block.mlp, consumer).in_features
    made = [f"{name}.mlp.{producer}" for producer in producers]
    of_channels = channels(
        made, f"{name}.mlp.{consumer}", width=width, sections=getattr(block.mlp, producers[0]).out_features // width,
        name=f"{name}.mlp", layer=number, **_added(block, name, 1),
    )  # fmt: skip
    return [of_heads, of_channels]


def _added(block: nn.Module, name: str, number: int) -> dict:
    """Where the output of the attention (0) or of the MLP (1) is added (ModuleSite); {} where no norm is known."""
    norm = next((norms[number] for norms in NORMS if all(hasattr(block, each) for each in norms)), None)
    if norm is None:
        return {}
    scales = (f"{name}.{SCALES[number]}",) if hasattr(block, SCALES[number]) else ()
    return {"stream": (f"{name}.{norm}", INPUT), "scales": scales}


def _attention(block: nn.Module) -> Attention | None:
    for names in ATTENTION:
        projections = [f"{names.inner}.{projection}" for projection in names.projections]
        if _linear(block, *projections, names.consumer) and hasattr(block.get_submodule(names.inner), names.size):
            return names
    return None


def _mlp(block: nn.Module) -> tuple[tuple[str, ...], str] | None:
    """Names of the layers that make the hidden channels, and of the one that reads them."""
    return next((found for found in MLP if _linear(block, *(f"mlp.{name}" for name in (*found[0], found[1])))), None)


def _linear(block: nn.Module, *names: str) -> bool:
    """Whether all these are linear layers of a block."""
    layers = dict(block.named_modules())
    return all(isinstance(layers.get(name), nn.Linear) for name in names)
