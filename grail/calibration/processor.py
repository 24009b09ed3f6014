"""How images become inputs, from the JSON that transformers' image processors write; none of their code is run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..checkpoint.reader import read_json
from ..errors import GrailError
from .preprocessing import Preprocessing

log = logging.getLogger("grail")

FILE, TOGETHER, PART = "preprocessor_config.json", "processor_config.json", "image_processor"
MOST_SIDE, MOST_TIMES = 4096, 8
"""Pixels of a side, and of what the network reads at most so many times its image_size."""
RESAMPLE = {2: "bilinear", 3: "bicubic"}
"""PIL's numbers."""
BILINEAR, BICUBIC = 2, 3
CUBIC = ("CLIP", "Bit", "DeiT", "Siglip", "Convnext")
"""What the names of processors begin with that take bicubic where nothing is said."""


def preprocessing_of(folder: Path, channels: int, image_size: Any = None) -> Preprocessing | None:
    """What preprocessor_config.json (or processor_config.json) of a folder says; None without either. Raises GrailError
    naming the file where it asks for something else than to resize, crop, scale to 0..1 and normalise, or for images
    far beyond the network's own image_size (a number or two, as its configuration has it)."""
    file = file_of(folder)
    if file is None:
        return None
    found: Any = read_json(file) if file.name == FILE else read_json(file).get(PART)
    if not isinstance(found, dict):
        return None
    try:
        return _read(found, channels, _most(image_size))
    except (TypeError, ValueError, KeyError, ZeroDivisionError, OverflowError) as error:
        reason = str(error) if isinstance(error, GrailError) else f"no size, mean or std that GRAIL reads ({error})"
        raise GrailError(f"{file}: {reason}") from error


def file_of(folder: Path) -> Path | None:
    """The file of a folder that says how images become inputs."""
    return next((folder / name for name in (FILE, TOGETHER) if (folder / name).is_file()), None)


def _most(image_size: Any) -> int:
    """Pixels that a side may have."""
    sides = [side for side in _listed(image_size) if type(side) is int]
    return min(MOST_SIDE, MOST_TIMES * max(sides)) if sides else MOST_SIDE


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _read(found: dict[str, Any], channels: int, most: int) -> Preprocessing:
    factor = found.get("rescale_factor", 1 / 255)
    if not found.get("do_rescale", True) or abs(factor * 255 - 1) > 1e-3:
        raise GrailError(f"pixels are read as they are or scaled by {factor}; only 1/255 is supported")
    resized = found.get("size")
    cropped = found.get("crop_size") if found.get("do_center_crop", "crop_size" in found) else None
    for name, value, limit in (("size", resized, most if cropped is None else MOST_SIDE), ("crop_size", cropped, most)):
        if value is not None and max(_sides(value)) > limit:
            raise GrailError(f"{name} is {value}, where a side can have {limit} pixels for this network; correct it")
    size = _sides(resized if cropped is None else cropped)
    share = 1.0
    if cropped is not None and found.get("do_resize", True) and resized is not None:
        share = min(min(size) / min(_sides(resized)), 1.0)
    if not found.get("do_resize", True):
        log.warning("transformers does not resize images for this model (do_resize); GRAIL does where they differ")
    elif cropped is None and not (isinstance(resized, dict) and "shortest_edge" in resized):
        log.warning("transformers squashes images to the size for this model; GRAIL crops their centre instead")
    plain = not found.get("do_normalize", True)
    mean = (0.0,) * channels if plain else tuple(map(float, found["image_mean"]))
    std = (1.0,) * channels if plain else tuple(map(float, found["image_std"]))
    return Preprocessing(size, channels, mean, std, share, _interpolation(found))


def _interpolation(found: dict[str, Any]) -> str:
    kind = str(found.get("image_processor_type") or found.get("feature_extractor_type") or "")
    default = BICUBIC if kind.startswith(CUBIC) else BILINEAR
    number = found.get("resample", default)
    if number not in RESAMPLE:
        log.warning(
            f"transformers resizes images for this model otherwise (resample {number}); GRAIL does it bicubically"
        )
    return RESAMPLE.get(number, "bicubic")


def _sides(value: Any) -> tuple[int, int]:
    """(height, width): a number, or one of transformers' ways to say it."""
    if isinstance(value, dict):
        value = value["shortest_edge"] if "shortest_edge" in value else (value["height"], value["width"])
    tall, wide = (value, value) if isinstance(value, int) else value
    return tall, wide
