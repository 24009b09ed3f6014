"""CLIP of open_clip, image and text towers of blocks as in packed.py. An image tower of another kind (timm's, a ResNet)
is described by its own family. Text: what stands behind the token that is pooled counts for nothing where the tower is
causal; where it reads all places, all count. A tower that appends a token of its own with a mask for each head (CoCa)
keeps its heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from . import joined
from .base import Producer
from .network import IMAGES, STILL, TEXT, ModuleSite, Network
from .packed import blocks_of, tower
from .texts import and_one_more, up_to_the_end

IMAGE_CALL, TEXT_CALL = "encode_image", "encode_text"
PADDING = 0


def describe(module: nn.Module, still: frozenset[str] = STILL) -> list[Network] | None:
    """The towers' networks, or None where there is no CLIP. Attention whose heads may go is replaced in the module.
    Raises GrailError naming a block that computes otherwise."""
    if not all(callable(getattr(module, call, None)) for call in (IMAGE_CALL, TEXT_CALL)):
        return None
    if not isinstance(getattr(module, "visual", None), nn.Module):
        return None
    blocks = blocks_of(module)
    visual = {name: parts for name, parts in blocks.items() if name.startswith("visual.")}
    image = tower(module, visual, still) if visual else _of_another_family(module, still)
    others = {name: parts for name, parts in blocks.items() if name not in visual and not _decodes(name)}
    appends = getattr(getattr(module, "text", module), "cls_emb", None) is not None
    text = tower(module, others, still | {"heads"} if appends else still)
    towers = [replace(image, call=IMAGE_CALL, reads=IMAGES)]
    if text.sites:
        towers.append(replace(text, call=TEXT_CALL, reads=TEXT, counted=_counted(module)))
    return [found for found in towers if found.sites]


def _decodes(name: str) -> bool:
    """Whether a block lies in a decoder that reads both towers (CoCa), which neither of them runs."""
    return name.startswith("text_decoder.")


def _counted(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    text = getattr(module, "text", module)
    if getattr(text, "cls_emb", None) is not None:
        return partial(and_one_more, padding=getattr(text, "pad_id", PADDING))
    pooling = getattr(text, "pool_type", None) or getattr(module, "text_pool_type", None)
    if pooling == "eos":
        return partial(up_to_the_end, end=getattr(text, "eos_id", None) or getattr(module, "text_eos_id", None))
    return up_to_the_end if pooling == "argmax" else None


def _of_another_family(module: nn.Module, still: frozenset[str]) -> Network:
    """An image tower of timm or a ResNet: the description of its own families under the longer names; of one that
    they hardly know, none."""
    found = joined.describe(module.visual, still)
    if found is not None and joined.share(found) >= joined.LEAST:
        sites, residual = ([_moved(site) for site in part] for part in (found.sites, found.residual))
        return Network(module, sites, [f"visual.{name}" for name in found.blocks], residual)
    return Network(module, [])


def _moved(site: ModuleSite) -> ModuleSite:
    def longer(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"visual.{name}" for name in names)

    pairs = {key: tuple((f"visual.{n}", a) for n, a in getattr(site, key)) for key in ("counts", "widths")}
    producers = tuple(Producer(f"visual.{p.name}", p.rows_per_unit, p.sections) for p in site.producers)
    names = {"name": f"visual.{site.name}", "consumer": f"visual.{site.consumer}"}
    names |= {key: longer(getattr(site, key)) for key in ("norms", "readers", "reader_norms", "scales")}
    stream = site.stream and (f"visual.{site.stream[0]}", site.stream[1])
    return replace(site, producers=producers, stream=stream, **names, **pairs)
