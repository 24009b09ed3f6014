"""A CLIP as a classifier without training: images against the texts of the classes (Radford et al., ICML 2021).

B images, C classes, E width of the common space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..documents import LARGEST, check_regular
from ..errors import GrailError
from .accuracy import evaluating

TEMPLATES = ("a photo of a {}.",)
CALLS = (("encode_image", "encode_text"), ("get_image_features", "get_text_features"))
"""The two methods of open_clip's modules and of transformers'."""


class ZeroShot(nn.Module):
    """Logits [B, C] of images: cosines with each class's text, its mean over the templates, times the model's scale.

    tokenizer: texts -> token ids [N, L]; templates hold "{}" where the name of a class goes. The texts are encoded
    once, on the module's device."""

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        classes: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
    ):
        super().__init__()
        self.module = module
        self.image_call, text_call = calls_of(module)
        device = next(module.parameters()).device
        found = []
        with evaluating(module):
            for name in classes:
                ids = tokenizer([template.replace("{}", name) for template in templates])
                text_TE = F.normalize(features(getattr(module, text_call)(ids.to(device))), dim=-1)
                found.append(F.normalize(text_TE.mean(0), dim=0))
        self.register_buffer("text_CE", torch.stack(found))

    def forward(self, images: Tensor) -> Tensor:
        """[B, C] from [B, channels, H, W]."""
        image_BE = F.normalize(features(getattr(self.module, self.image_call)(images)), dim=-1)
        return self.module.logit_scale.exp() * image_BE @ self.text_CE.mT


def features(found: object) -> Tensor:
    """The features [B, E] among what a tower gives: a tensor, the first of several, or transformers' pooled output."""
    if isinstance(found, Tensor):
        return found
    pooled = getattr(found, "pooler_output", None)
    return pooled if pooled is not None else found[0]


def is_clip(module: nn.Module) -> bool:
    """Whether a module encodes images and texts."""
    return calls_of(module) is not None


def calls_of(module: nn.Module) -> tuple[str, str] | None:
    """Names of the methods that encode images and texts; None for a module that does not."""
    return next((c for c in CALLS if all(callable(getattr(module, call, None)) for call in c)), None)


def read_templates(file: str | Path | None) -> tuple[str, ...]:
    """Those of a text file, one to a line; the default without one. Raises GrailError naming one that has no place for
    the name."""
    if file is None:
        return TEMPLATES
    found = read_lines(file, "--templates")
    for template in found:
        if "{}" not in template:
            raise GrailError(f'--templates {file}: "{template}" has no {{}} where the name of the class goes')
    return tuple(found)


def read_lines(file: str | Path, option: str) -> list[str]:
    """The lines of a UTF-8 text file that are not empty. Raises GrailError naming the file."""
    try:
        check_regular(Path(file), LARGEST)
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise GrailError(f"{option} {file}: {reason}") from error
    lines = [line for line in lines if line]
    if not lines:
        raise GrailError(f"{option} {file}: there is nothing in it")
    return lines
