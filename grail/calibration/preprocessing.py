"""From pixels to what a vision network reads, as timm evaluates: resize, centre crop, scale to 0..1, normalise.

torchvision is only needed where an image has to be resized.
"""

from __future__ import annotations

import importlib
import logging
import math
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GrailError

log = logging.getLogger("grail")

INTERPOLATIONS = ("bicubic", "bilinear")
MOST_PIXELS = 2**26
"""Of one image, as it is read and as it is resized."""
LUMA = (0.299, 0.587, 0.114)
"""ITU-R 601, as PIL and torchvision turn RGB into grey."""


def imported(module: str, install: str = "grail-compress[vision]") -> ModuleType:
    """A module of an optional package; raises GrailError that names what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise GrailError(f"images need {package}, which cannot be imported here; pip install '{install}'") from error


@dataclass(frozen=True)
class Preprocessing:
    """size is (height, width) of the result; crop is the share of the resized short side that is kept.

    mean and std are per channel, of pixels in 0..1. Raises GrailError for values that make no sense.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 1.0
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if len(self.size) != 2 or any(type(n) is not int or n < 1 for n in self.size):
            raise GrailError(f"preprocessing: the size must be two positive integers, not {self.size}")
        if self.channels not in (1, 3):
            raise GrailError(f"preprocessing: images have 1 or 3 channels, not {self.channels}")
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise GrailError(f"preprocessing: mean {self.mean} and std {self.std} need {self.channels} values each")
        if not all(math.isfinite(value) for value in self.mean) or not all(0 < value < math.inf for value in self.std):
            raise GrailError(f"preprocessing: mean {self.mean} must be finite and std {self.std} finite and above 0")
        if not 0 < self.crop <= 1:
            raise GrailError(f"preprocessing: the crop must be above 0 and at most 1, not {self.crop}")
        if self.interpolation not in INTERPOLATIONS:
            raise GrailError(f"preprocessing: interpolation is {' or '.join(INTERPOLATIONS)}, not {self.interpolation}")

    def __call__(self, images: Tensor) -> Tensor:
        """[..., C, H, W], uint8 or float in 0..1, C 1 or 3 -> float32 [..., channels, *size].

        Images that have the size already are not resized. Raises GrailError for other shapes, dtypes and values, and
        for images so thin that they would be resized to more than MOST_PIXELS.
        """
        if images.dim() < 3 or images.shape[-3] not in (1, 3) or 0 in images.shape:
            raise GrailError(f"an image must be [C, H, W] with 1 or 3 channels, not {list(images.shape)}")
        if images.dtype != torch.uint8:
            images = _unit_floats(images)
        if tuple(images.shape[-2:]) != self.size:
            images = self._cropped(self._resized(images))
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return (self._coloured(images) - mean) / std

    def _resized(self, images: Tensor) -> Tensor:
        functional = imported("torchvision.transforms.v2.functional")
        modes = imported("torchvision.transforms").InterpolationMode
        target = list(self._covering(*images.shape[-2:]))
        if math.prod(target) > MOST_PIXELS:
            (height, width), (tall, wide) = images.shape[-2:], target
            raise GrailError(
                f"an image of {width} x {height} pixels, so thin, would be resized to {wide} x {tall} before its "
                f"centre is cropped; crop it or take it out"
            )
        resized = functional.resize(images, target, interpolation=modes(self.interpolation), antialias=True)
        return resized.clamp(0, 1) if resized.is_floating_point() else resized  # bicubic overshoots at edges

    def _covering(self, height: int, width: int) -> tuple[int, int]:
        """The image's size, its aspect kept, when it just covers size / crop; rounded as timm and torchvision do."""
        tall, wide = (math.floor(n / self.crop) for n in self.size)
        if tall * width >= wide * height:
            return tall, max(wide, int(tall * width / height))
        return max(tall, int(wide * height / width)), wide

    def _cropped(self, images: Tensor) -> Tensor:
        tall, wide = self.size
        top, left = (round((have - want) / 2) for have, want in zip(images.shape[-2:], self.size, strict=True))
        return images[..., top : top + tall, left : left + wide]

    def _coloured(self, images: Tensor) -> Tensor:
        if images.shape[-3] == self.channels:
            return images
        if self.channels == 3:
            return images.expand(*images.shape[:-3], 3, *images.shape[-2:])
        luma = torch.tensor(LUMA, device=images.device).view(3, 1, 1)
        return (images * luma).sum(-3, keepdim=True)

    @classmethod
    def from_timm(cls, model: nn.Module) -> Preprocessing:
        """What timm's data configuration says of a timm model, at the size and channels it was really built with
        (the configuration keeps those of the pretrained weights)."""
        found = imported("timm.data").resolve_model_data_config(model)
        if found["crop_mode"] != "center":
            log.warning("timm squashes or pads images for this model; GRAIL crops their centre instead")
        built = getattr(getattr(model, "patch_embed", None), "img_size", None)
        channels = _channels_read(model) or found["input_size"][0]
        mean, std = tuple(found["mean"]), tuple(found["std"])
        if channels == 1 and len(mean) == 3:
            mean, std = (sum(mean) / 3,), (sum(std) / 3,)
        interpolation = found["interpolation"] if found["interpolation"] in INTERPOLATIONS else "bicubic"
        size = tuple(built or found["input_size"][1:])
        return cls(size, channels, mean, std, min(found["crop_pct"], 1.0), interpolation)

    @classmethod
    def from_open_clip(cls, model: nn.Module) -> Preprocessing:
        """What open_clip's configuration says of a model: the short side is resized to the size, the centre kept."""
        visual: Any = model.visual
        found = dict(getattr(visual, "preprocess_cfg", None) or imported("open_clip").transform.PreprocessCfg())
        if found.get("resize_mode", "shortest") != "shortest":
            log.warning("open_clip squashes or pads images for this model; GRAIL crops their centre instead")
        size = found.get("size", visual.image_size)
        size = (size, size) if isinstance(size, int) else tuple(size)
        interpolation = found["interpolation"] if found["interpolation"] in INTERPOLATIONS else "bicubic"
        return cls(size, 3, tuple(found["mean"]), tuple(found["std"]), 1.0, interpolation)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Preprocessing:
        """From what to_json gave, tuples having become lists; raises GrailError for anything else."""
        try:
            lists = {name: tuple(found[name]) for name in ("size", "mean", "std")}
            return cls(**{**found, **lists})
        except (TypeError, KeyError) as error:
            raise GrailError(f"preprocessing: a field is missing, unknown or of the wrong type ({error})") from error


def _unit_floats(images: Tensor) -> Tensor:
    if not images.is_floating_point():
        raise GrailError(f"an image must be uint8, or floats in 0..1, not {images.dtype}")
    images = images.float()
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise GrailError("a float image must lie in 0..1; give uint8, or floats divided by 255")
    return images


def _channels_read(model: nn.Module) -> int | None:
    """Input channels of the first convolution."""
    return next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), None)
