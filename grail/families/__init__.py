"""The only place that knows a model. A family lists its model types; nothing outside asks which one it is."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..checkpoint.reader import read_json
from ..errors import GrailError
from ..modeling_grail import PREFIX
from ..modules.names import is_network
from ..registration import register
from . import clip, hf_vision, joined, llama
from .base import Producer, Site
from .network import STILL, Network

__all__ = ["Producer", "Site", "describe", "open_family", "register", "supports"]

FAMILIES = (llama,)


def describe(module: nn.Module, still: frozenset[str] = STILL) -> list[Network]:
    """The sites of a network in memory, tower by tower; those of kinds that stay as they are may be missing where they
    could not be narrowed. Attention modules may be replaced by equal ones. Raises GrailError where no family knows its
    blocks, or they are but a small part of it."""
    towers = clip.describe(module, still) or hf_vision.describe(module)
    if towers:
        return towers
    network = joined.describe(module, still)
    if network is not None:
        joined.check_share(network)
        return [network]
    raise GrailError(
        f"{type(module).__name__} has no blocks that a family knows (conv1, conv2 or attn, mlp): describe its sites by "
        f"hand, grail.compress(module, sites=[grail.channels(...), ...])"
    )


def supports(folder: Path) -> bool:
    """Whether a family knows the model type of a checkpoint folder. Raises GrailError where there is no config.json."""
    return any(_plain_type(folder) in family.MODEL_TYPES for family in FAMILIES)


def _plain_type(folder: Path) -> object:
    config_file = folder / "config.json"
    if not config_file.exists():
        raise GrailError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    model_type = read_json(config_file).get("model_type")
    return model_type.removeprefix(PREFIX) if isinstance(model_type, str) else None


def open_family(folder: Path, **options):
    """The family object for a checkpoint folder; raises GrailError naming an unsupported model type."""
    plain_type = _plain_type(folder)
    for family in FAMILIES:
        if plain_type in family.MODEL_TYPES:
            return family.open_folder(folder, **options)
    if is_network(str(folder)):
        raise GrailError(f"{folder} holds a vision network, and this command is for language models")
    known = ", ".join(name for family in FAMILIES for name in family.MODEL_TYPES)
    model_type = read_json(folder / "config.json").get("model_type")
    raise GrailError(f"{folder / 'config.json'}: model type {model_type!r} is not supported; supported: {known}")
