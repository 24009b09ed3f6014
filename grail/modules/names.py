"""Which names and folders are networks in memory."""

from __future__ import annotations

from pathlib import Path

from ..documents import read_json

LIBRARIES = ("timm", "torchvision", "open_clip")
PACKAGES = ("timm", "torchvision", "open_clip_torch")
"""What they are called on PyPI."""
NAMED = " and ".join(f"{library}/NAME" for library in LIBRARIES)
KEY = "grail_module"
"""What marks the config.json of such a folder."""
HF_TYPES = ("clip", "clip_text_model", "clip_vision_model", "deit", "dinov2", "vit")
"""Model types of transformers' own vision networks."""


def is_module_folder(path: Path) -> bool:
    """Whether a folder holds a network of this kind."""
    file = path / "config.json"
    return file.is_file() and KEY in read_json(file)


def is_hf_folder(path: Path) -> bool:
    """Whether a folder holds a vision network as transformers writes it."""
    file = path / "config.json"
    found = read_json(file) if file.is_file() else {}
    return KEY not in found and found.get("model_type") in HF_TYPES


def is_hf_module(module: object) -> bool:
    """Whether a module is such a network."""
    return getattr(getattr(module, "config", None), "model_type", None) in HF_TYPES


def is_network(model: str) -> bool:
    """Whether a name or folder is a network of this kind."""
    path = Path(model)
    return is_module_folder(path) or is_hf_folder(path) if path.exists() else model.partition("/")[0] in LIBRARIES
